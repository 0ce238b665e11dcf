"""File names shared by commands: one command writes a file into a folder, and another command reads it by this name."""

DATASET_FILE = "dataset.json"  # in a token data set: dVAE, tokenizer and settings of its shards, written first
MANIFEST_FILE = "manifest.json"  # in a token data set: sums over its shards and the name of their index, written last
DVAE_FILE = "dvae.safetensors"  # in the run folder of a dVAE, in a token data set, and in an export
TOKENIZER_FILE = "tokenizer.model"  # in a token data set and in an export
PRIOR_FILE = "model.safetensors"  # in an export
SAMPLES_FILE = "samples.json"  # in a folder of samples: its record, written last
