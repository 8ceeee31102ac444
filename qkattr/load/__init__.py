"""Models, tokenizers and SAEs from files; what does not fit is refused before weights are read.

    opening        load(model, saes): the one entrance, which makes a `bundle`
    models/        folders, GGUF files and parameter trees -> a `Checkpoint` of named tensors, and
                   by the tables of `families` or of a tree -> `ModelConfig` and `Params`
    dictionaries/  SAEs in every known format, or a packed file -> one `Dictionary` a boundary
    tensors/       safetensors, npz, PyTorch and GGUF files as memory-mapped arrays
    text/          text and chat messages -> ids; corpora
    registry       the models and SAEs known by name; named, hub: what a name stands for, as files
    cached         which of them are in the hub's cache
    smollm2        the model whose SAEs and cards are in the package
    fingerprint    what identifies weights in results

Nothing is unpickled, and no code of a checkpoint is run; chat templates are rendered in jinja2's
sandbox.
"""
