"""What ``generation_config.json``, and ``config.json`` in its place, may say of generation: transformers' names."""

from typing import Any

# Those that are heeded, by our names; as in vLLM, and stop_strings.
HEEDED = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_strings": "stop",
}
# What else changes the text there, by the value that changes nothing.
NEUTRAL: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "penalty_alpha": 0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "top_h": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": [],
    "begin_suppress_tokens": [],
    "sequence_bias": {},
    "exponential_decay_length_penalty": [],
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1.0,
    "min_length": 0,
    "max_time": None,
    "num_return_sequences": 1,
    "constraints": [],
    "force_words_ids": [],
    "watermarking_config": {},
    "token_healing": False,
    "dola_layers": None,
}
# Read one by one, and what is of those above alone.
_OTHERS = """
    do_sample max_length suppress_tokens bos_token_id eos_token_id pad_token_id decoder_start_token_id
    diversity_penalty early_stopping length_penalty output_attentions output_hidden_states output_scores
    return_dict_in_generate use_cache
"""
GENERATION_KEYS = frozenset([*HEEDED, *NEUTRAL, *_OTHERS.split()])
