"""Text to token ids: tokenizers, corpora, files of prompts."""
