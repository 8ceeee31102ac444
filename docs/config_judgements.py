"""What each attribute of a config does, judged by hand; read by `config_attributes.py`.

Keys of ONLY, WHY and USED_WHY are names, or (family, name) where a family differs.
"""

from __future__ import annotations

HEAD = """\
# What the attributes of a Hugging Face config.json do, by the code of `transformers`. Read by
# `qkattr.load.models.families.attributes`. Written by docs/config_attributes.py on DATE from the
# releases below; what an attribute does is judged by hand, in docs/config_judgements.py: change
# that file and run the script again, as its first lines say.
#
#   [base.arithmetic]      in any config: changes what the families that read it compute
#   [base.GROUP]           in any config: changes nothing, for the reason that the group names
#   [generation]           the rest of what a GenerationConfig sets: no forward pass reads it
#   [families.NAME.used]   in configs of one family, and before [base]: part of the arithmetic
#   [families.NAME.inert]  in configs of one family, and before [base]: changes nothing
#
# versions  the first and last release whose class sets the attribute; absent: none does
# default   as JSON, what a config without it means
# was       other defaults, with their releases. They matter only to configs written by hand:
#           transformers writes what a family's class declares, default or not; in the text_config
#           of Gemma 3 it may leave defaults out, and those have never changed
# only      as JSON, the values at which it changes nothing; absent: it changes nothing at any
#           value, or in [base.arithmetic] is never without effect
# read      the releases in which the code of a causal language model looks at it
# why       the reason; of an attribute in use, what there is to know
"""

#: Families and the classes of their configs.
CLASSES = {
    "gpt2": "GPT2Config",
    "gpt_neox": "GPTNeoXConfig",
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "gemma2": "Gemma2Config",
    "gemma3_text": "Gemma3TextConfig",
    "gemma3": "Gemma3Config",
    "olmo2": "Olmo2Config",
    "phi3": "Phi3Config",
}

#: Attributes that may stand in any config, by what they are for. The first group is not inert.
GROUPS = {
    "arithmetic": """tie_word_embeddings rope_theta rope_scaling rope_parameters
        partial_rotary_factor rope_interleaved per_layer_config is_causal
        use_bidirectional_attention sliding_window use_sliding_window attn_logit_softcapping
        final_logit_softcapping quantization_config pruned_heads add_cross_attention""",
    "generation": """max_length min_length do_sample early_stopping num_beams num_beam_groups
        diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
        no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
        forced_bos_token_id forced_eos_token_id remove_invalid_values suppress_tokens
        begin_suppress_tokens exponential_decay_length_penalty task_specific_params prefix
        use_cache use_cash output_past cache_implementation badwordsids""",
    "tokens": """bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id
        eos_token_ids bos_token eos_token pad_token decoder_start_token_id tokenizer_class
        model_max_length max_sequence_length""",
    "output": """output_attentions _output_attentions output_hidden_states output_scores
        return_dict return_dict_in_generate use_return_dict tie_last_hidden_states""",
    "training": """initializer_range attention_dropout hidden_dropout classifier_dropout
        gradient_checkpointing tf_legacy_loss line_by_line unsloth_version unsloth_fixed""",
    "heads_of_other_tasks": """id2label label2id num_labels _num_labels problem_type
        finetuning_task""",
    "encoder_decoder": """is_decoder is_encoder_decoder cross_attention_hidden_size
        tie_encoder_decoder""",
    "bookkeeping": """architectures auto_map transformers_version name_or_path _name_or_path
        _commit_hash _post_init_done base_model_tp_plan ignore_keys_at_rope_validation
        is_llama_config transformers.js_config custom_pipeline custom_pipelines
        internal_version""",
    "how_it_is_computed": """dtype torch_dtype use_bfloat16 torchscript xla_device pretraining_tp
        chunk_size_feed_forward attn_implementation _attn_implementation
        _attn_implementation_internal _attn_implementation_autoset _flash_attn_2_enabled
        experts_implementation _experts_implementation _experts_implementation_internal
        _pre_quantization_dtype""",
    "of_qwen_alone": "max_window_layers",
}

#: In the classes of families: what is part of the arithmetic.
USED = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim hidden_act hidden_activation activation_function
    max_position_embeddings rms_norm_eps layer_norm_eps layer_norm_epsilon tie_word_embeddings
    rope_theta rope_local_base_freq rotary_emb_base rotary_pct
    partial_rotary_factor attention_bias mlp_bias sliding_window use_sliding_window
    max_window_layers layer_types sliding_window_pattern attn_logit_softcapping
    final_logit_softcapping query_pre_attn_scalar use_parallel_residual n_embd n_head n_layer
    n_positions n_inner scale_attn_weights scale_attn_by_inverse_layer_idx text_config"""

#: What is inert in one family, with names that no class has and published configs do.
FAMILY_INERT = {
    "gpt2": """n_ctx n_vocab n_special predict_special_tokens attn_pdrop embd_pdrop resid_pdrop
        reorder_and_upcast_attn summary_activation summary_first_dropout summary_last_dropout
        summary_proj_to_labels summary_type summary_use_proj vocab_size_or_config_json_file""",
    "gpt_neox": """rope_theta partial_rotary_factor attention_probs_dropout_prob
        hidden_dropout_prob""",
    "mistral": "use_sliding_window",
    "qwen2": "use_mrope",
    "gemma2": "hidden_act sliding_window_size sliding_window_pattern",
    "gemma3_text": "hidden_act _sliding_window_pattern attn_logit_softcapping",
    "gemma3": """vision_config mm_tokens_per_image boi_token_index eoi_token_index
        image_token_index image_token_id boi_token_id eoi_token_id""",
    "phi3": """embd_pdrop resid_pdrop original_max_position_embeddings use_sliding_window
        attention_bias mlp_bias lm_head_bias full_attn_mod interpolate_factor""",
}

_OFF, _NONE, _ONE = "[false, null]", "[null]", "[1, null]"
#: As JSON, the values at which alone an attribute changes nothing.
ONLY = {
    "partial_rotary_factor": _ONE,
    ("gpt_neox", "partial_rotary_factor"): "",
    "rope_interleaved": _OFF,
    "per_layer_config": "[null, {}]",
    "is_causal": "[true]",
    "use_bidirectional_attention": _OFF,
    "sliding_window": _NONE,
    "use_sliding_window": _OFF,
    ("mistral", "use_sliding_window"): "[true, null]",
    ("phi3", "use_sliding_window"): "[true, null]",
    "attn_logit_softcapping": _NONE,
    "final_logit_softcapping": _NONE,
    "quantization_config": _NONE,
    "pruned_heads": "[{}, null]",
    "add_cross_attention": _OFF,
    "is_encoder_decoder": _OFF,
    "tie_encoder_decoder": _OFF,
    "use_mrope": _OFF,
    ("gemma2", "sliding_window_pattern"): "[2, null]",
    ("phi3", "attention_bias"): _OFF,
    ("phi3", "mlp_bias"): _OFF,
    "lm_head_bias": _OFF,
    "full_attn_mod": _ONE,
    "interpolate_factor": _ONE,
}

_DROPOUT = "a dropout rate: no effect outside training"
_WINDOW_HERE = "there is a window wherever sliding_window is set; false contradicts that"
_KERNEL = "another kernel for the same attention"
_UNREAD = "no release reads it"
#: Why an attribute changes nothing; in the group "arithmetic", what it changes.
WHY: dict[str | tuple[str, str], str] = {
    "tie_word_embeddings": "the unembedding is the embedding; the default is the family's",
    "rope_parameters": "since 5.0 an object in place of the other attributes of rotary",
    "rope_theta": "the base of rotary; the default is the family's",
    "rope_scaling": "the kind of rotary; of Gemma 3, in blocks without a window",
    "partial_rotary_factor": "the share of a head that is turned; of phi3 and gpt_neox alone",
    "rope_interleaved": "no release reads it; true: another order of a head's dimensions",
    "per_layer_config": "overrides attributes block by block, or leaves parts of blocks out",
    "is_causal": "false, as null: attention in both directions (masking_utils.py)",
    "use_bidirectional_attention": "attention in both directions, with half of Gemma's window",
    "sliding_window": "of the families that list it",
    "use_sliding_window": "of the families that list it",
    "attn_logit_softcapping": "of gemma2 alone",
    "final_logit_softcapping": "of Gemma alone",
    "quantization_config": "the tensors are not the weights",
    "pruned_heads": "heads that are taken out of the weights, before 5.0",
    "add_cross_attention": "adds cross-attention to the blocks",
    "is_encoder_decoder": "true: not a decoder alone",
    "tie_encoder_decoder": "true: not a decoder alone",
    "is_decoder": "only models that can be encoders read it; these are always causal",
    "use_cache": "keys and values are kept, not changed",
    "use_cash": "use_cache, misspelt in published configs",
    "badwordsids": "tokens that KoboldAI never generates",
    "eos_token_ids": _UNREAD,
    "line_by_line": "how a text was cut up for training",
    "output_past": "the name of use_cache before 2.9",
    "output_attentions": "what is returned",
    "output_hidden_states": "what is returned",
    "use_return_dict": "what is returned",
    "tie_last_hidden_states": "whether the last state that is returned stands after the norm",
    "prefix": "text that pipelines put before a prompt",
    "pad_token_id": "padding_idx of the embedding: stops gradients, changes no value",
    "gradient_checkpointing": "blocks are computed twice in training",
    "initializer_range": "of random weights",
    "attention_dropout": _DROPOUT,
    "hidden_dropout": _DROPOUT,
    "auto_map": "code of the repository, which runs only with trust_remote_code",
    "torch_dtype": "the precision of the weights, not what is computed",
    "dtype": "the precision of the weights, not what is computed",
    "use_bfloat16": "of TensorFlow on TPUs",
    "torchscript": "tied weights are copied instead of shared: the same numbers",
    "chunk_size_feed_forward": "MLPs over parts of the sequence in turn, in no family here",
    "pretraining_tp": "4.33-4.47 split Llama's products into parts that are added or joined",
    "_attn_implementation": _KERNEL,
    "_flash_attn_2_enabled": _KERNEL,
    "_pre_quantization_dtype": "the precision of flash attention",
    "max_window_layers": "read beside use_sliding_window",
    # Of families
    ("gpt2", "n_ctx"): "the size of the causal mask, as large as n_positions",
    ("gpt2", "n_vocab"): "all releases read vocab_size",
    ("gpt2", "n_special"): "an attribute of OpenAI GPT",
    ("gpt2", "predict_special_tokens"): "an attribute of OpenAI GPT",
    ("gpt2", "vocab_size_or_config_json_file"): "an argument of the constructor, never written",
    "attn_pdrop": _DROPOUT,
    "embd_pdrop": _DROPOUT,
    "resid_pdrop": _DROPOUT,
    "reorder_and_upcast_attn": "scores are scaled in the product, and in float32",
    ("gpt_neox", "partial_rotary_factor"): "4.46-4.57 write it as a copy of rotary_pct, which wins",
    ("gpt_neox", "rope_theta"): "4.46-4.57 write it as a copy of rotary_emb_base, which wins",
    ("gpt_neox", "attention_probs_dropout_prob"): _DROPOUT,
    ("gpt_neox", "hidden_dropout_prob"): _DROPOUT,
    "max_sequence_length": _UNREAD,
    ("mistral", "use_sliding_window"): _WINDOW_HERE,
    ("phi3", "use_sliding_window"): _WINDOW_HERE,
    "use_mrope": "no release reads it; true: rotary of Qwen 2 VL",
    ("gemma2", "hidden_act"): "all releases read hidden_activation",
    ("gemma2", "sliding_window_size"): "all releases read sliding_window",
    ("gemma2", "sliding_window_pattern"): "no release reads it; the pattern is always 2",
    ("gemma3_text", "hidden_act"): "all releases read hidden_activation",
    ("gemma3_text", "_sliding_window_pattern"): "written beside layer_types, never read back",
    ("gemma3_text", "attn_logit_softcapping"): "kept and never used; a value contradicts that",
    "image_token_index": "where images stand, which text has not",
    "image_token_id": "where images stand, which text has not",
    "vision_config": "of the part that sees",
    "mm_tokens_per_image": "of the part that sees",
    ("phi3", "original_max_position_embeddings"): "read by rope types longrope, su and yarn alone",
    ("phi3", "attention_bias"): _UNREAD,
    ("phi3", "mlp_bias"): _UNREAD,
    "lm_head_bias": _UNREAD,
    "full_attn_mod": _UNREAD,
    "interpolate_factor": _UNREAD,
}

_WINDOWS = "null: with use_sliding_window, a window in blocks max_window_layers and on"
#: What there is to know of an attribute that is part of a family's arithmetic.
USED_WHY: dict[str | tuple[str, str], str] = {
    "num_key_value_heads": "null: num_attention_heads",
    "n_inner": "null: 4 * n_embd",
    "text_config": "a config of gemma3_text; what it lacks has that family's defaults",
    ("llama", "head_dim"): "null: hidden_size // num_attention_heads",
    ("mistral", "head_dim"): "null: hidden_size // num_attention_heads",
    ("mistral", "layer_types"): "5.x reads a config that has it as one of a Ministral",
    ("mistral", "sliding_window"): "null: no window",
    ("phi3", "sliding_window"): "null: no window",
    ("qwen2", "layer_types"): _WINDOWS,
    ("qwen3", "layer_types"): _WINDOWS,
    ("qwen2", "max_window_layers"): "4.37-4.41 had the window in the blocks before it",
    ("qwen2", "sliding_window"): "only with use_sliding_window",
    ("qwen3", "sliding_window"): "only with use_sliding_window",
    ("gemma2", "layer_types"): "null: a window in blocks 0, 2, 4, ...",
    ("gemma3_text", "layer_types"): "null: a window but in each sliding_window_pattern-th block",
    ("gemma3_text", "sliding_window_pattern"): "read where there are no layer_types",
    ("gemma3_text", "rope_theta"): "of blocks without a window",
    ("gemma3_text", "rope_local_base_freq"): "of blocks with a window",
}
