"""An ONNX Runtime session made from the checked bytes, on the providers that were asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from latentguard.errors import ModelError
from latentguard.runtime.artifact import Artifact
from latentguard.text import visible

Provider = str | tuple[str, Mapping[str, Any]]
"""The name of an execution provider, or the name with its options."""

_DEFAULT = ("CUDAExecutionProvider", "CPUExecutionProvider")


def create_session(
    artifact: Artifact,
    providers: Sequence[Provider] | None,
    threads: int | None,
    spin: bool = True,
) -> Any:
    """An onnxruntime.InferenceSession; `providers`, `threads` and `spin` as in `Guard`.

    Raises ModelError where ONNX Runtime or a provider is missing, or it refuses the file.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ModelError("this needs onnxruntime: pip install 'latentguard[onnx]'") from error
    available = onnxruntime.get_available_providers()
    if providers is None:
        given: Sequence[Provider] = [name for name in _DEFAULT if name in available]
    else:
        given = providers
    wanted = [item if isinstance(item, str) else (item[0], dict(item[1])) for item in given]
    names = [item if isinstance(item, str) else item[0] for item in given]
    missing = [name for name in names if name not in available]
    if missing or not names:
        raise ModelError(
            f"ONNX Runtime has no {', '.join(missing) or 'provider'} here, it has "
            f"{', '.join(available)}: install onnxruntime-gpu for CUDA or onnxruntime-openvino for "
            "OpenVINO in place of onnxruntime, or choose another provider"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what it would log is raised
    # An .onnx file was looked at. By itself ONNX Runtime tells its own format by some bytes.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    if threads is not None:
        options.intra_op_num_threads = threads
    if not spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if artifact.external:
        beside = artifact.external
        options.add_external_initializers_from_files_in_memory(
            list(beside), list(beside.values()), [len(data) for data in beside.values()]
        )
    try:
        session = onnxruntime.InferenceSession(artifact.data, options, providers=wanted)
    # Its exceptions have no class in common.
    except Exception as error:
        raise ModelError(f"{artifact.path}: ONNX Runtime refuses it: {reason(error)}") from error
    lost = [name for name in names if name not in session.get_providers()]
    if lost and providers is not None:
        raise ModelError(
            f"{', '.join(lost)} cannot be used here (a driver or a library is missing): see what "
            "ONNX Runtime needs for it, or choose another provider"
        )
    # Its own fallback would go on with another provider after an error, and say so on a terminal.
    session.disable_fallback()
    # Kept for that fallback alone, and as large as the file.
    session._model_bytes = None
    return session


def reason(error: BaseException) -> str:
    """What an error of ONNX Runtime says, whole, on one line.

    Where in its sources the error arose stands before the reason, and may be longer than that.
    """
    said = " ".join(_SOURCE.sub(" ", str(error)).split())
    return visible(said or type(error).__name__, 600)


# "/onnxruntime_src/onnxruntime/core/graph/model.cc:180 onnxruntime::Model::Model(...)": a line of
# its sources, and the function with the types of its arguments.
_SOURCE = re.compile(
    r"\S+\.(?:cc|cpp|h):\d+ (?:[\w:<>*&]+ )?[\w:<>~]*::[\w~]+\((?:[^()]|\([^()]*\))*\)(?: const)?"
)
