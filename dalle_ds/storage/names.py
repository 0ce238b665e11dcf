"""Names of the files by which commands know each other's folders: what one writes, another finds by name."""

DATASET_FILE = "dataset.json"  # of token shards: what they were made with, written first
MANIFEST_FILE = "manifest.json"  # of token shards: all of them in one, written last
DVAE_FILE = "dvae.safetensors"  # of a dVAE's run, beside token shards, in an export
TOKENIZER_FILE = "tokenizer.model"  # beside token shards, in an export
PRIOR_FILE = "model.safetensors"  # of an export
SAMPLES_FILE = "samples.json"  # of a folder of samples: its record, written last
