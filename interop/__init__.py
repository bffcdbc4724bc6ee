"""The checkpoints of other libraries, and the Hugging Face Hub."""
