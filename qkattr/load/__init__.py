"""Models, tokenizers and SAEs from files; what does not fit is refused before weights are read.

    bundle      load(model, saes): the one entrance, and prompts to token ids
    hf, gguf    model folders and GGUF files -> `ModelConfig`, and a `Checkpoint` of named tensors
    weights     a checkpoint's tensors, checked and stacked -> `Params`
    mapped      safetensors files as memory-mapped arrays
    saes        folders of SAEs, or a packed GGUF file of all -> one `Dictionary` a boundary
    tokenizer   text and chat messages -> ids; gguf_tokenizer builds one from a GGUF file's metadata
    smollm2     the model whose SAEs and cards are in the package
    registry    the models and SAEs known by name; named, hub: what a name stands for, as files
    cached      which of them are in the hub's cache
    labels      what people call features, from any file; explanations, neuronpedia: of Neuronpedia
    groups      named groups of features
    tree        parameter trees of Flax and orbax checkpoints, by a table
    fingerprint what identifies weights in results

Nothing is unpickled, and no code of a checkpoint is run; chat templates are rendered in jinja2's
sandbox.
"""
