"""The code of exports in Hugging Face layout: written as modules of this package, shipped as self-contained files."""
