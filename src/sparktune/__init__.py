"""sparktune: from a chat JSONL to a fine-tuned, merged, exported Qwen3.5 on a desk-side box.

The rooms are folders at the top of the repository (`setup/`, `training/`, `kernels/`, `mtp/`, `lab/`) that are
linked in here, so that a bare `import kernels` keeps meaning the Hugging Face package of that name.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
