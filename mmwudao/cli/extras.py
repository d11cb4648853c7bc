"""Which extra a missing library belongs to, so that a command can say what to install. Imports nothing heavy."""

from __future__ import annotations

# what a module is imported as, and the extra of setup.cfg that installs it
EXTRA_OF = {
    "pyarrow": "search",
    "lancedb": "search",
    "lance": "search",
    "lark": "search",
    "filelock": "search",
    "platformdirs": "search",
    "pillow_heif": "photos",
    "rawpy": "photos",
    "textual_image": "photos",
    "fastapi": "serve",
    "fastapi_offline": "serve",
    "starlette": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
    "httpcore2": "serve",
    "multipart": "serve",
    "python_multipart": "serve",
    "gradio": "demo",
    "tensorboard": "train",
    "matplotlib": "train",
    "peft": "train",
    "resvg_py": "train",
    "msgpack": "train",
    "imagehash": "clean",
    "py3langid": "clean",
    "datasketch": "clean",
    "opencc": "clean",
    "phonenumbers": "clean",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "export",
    "pymilvus": "milvus",
    "grpc": "milvus",
    "ray": "ray",
    "lance_ray": "ray",
    "xformers": "gpu",
    "torchao": "int8",
}


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """The line that tells a user what to install, or None if the module is none of an extra."""
    module = (error.name or "").partition(".")[0]
    if module not in EXTRA_OF:
        return None
    return f"this needs {module}, which is not installed: pip install 'mmwudao[{EXTRA_OF[module]}]'"
