"""BGE-M3 as a book you can run. The modules are exported from the notebooks under `nbs/`; only this file is written by hand."""
__version__ = "0.0.1"

# What a user meets first. Nothing is imported until it is asked for, so `import bgem3_nb` stays light.
_PUBLIC = {
    "M3Encoder": "encoding", "EncoderPool": "encoding", "Embeddings": "encoding", "BGEM3FlagModel": "flag_model",
    "OnnxEncoder": "onnx_encoder", "export_onnx": "onnx_export",
    "explain": "scoring", "span_embeddings": "granularity",
    "encode_corpus": "store", "EmbeddingStore": "store", "search": "store",
    "M3Model": "model", "M3Config": "model",
    "ProjectionHead": "model", "M3WithHead": "projection", "export_sentence_transformers": "projection",
    "M3Trainer": "training", "M3TrainingArguments": "training",
    "load_source": "sources", "load_data": "formats", "save_data": "formats", "read_rows": "readers", "write_rows": "readers",
    "read_documents": "documents", "chunk_documents": "documents", "generate_queries": "queries", "rule_queries": "queries",
    "check_rows": "checks", "check_files": "checks", "analyse": "balance",
    "run_job": "jobs",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name):
    if name not in _PUBLIC: raise AttributeError(f"module 'bgem3_nb' has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(f"bgem3_nb.{_PUBLIC[name]}"), name)


def __dir__(): return __all__
