"""A compiled network, loaded and run by the C functions that it exports (torch/csrc/inductor/aoti_runtime/interface.h).

torch's own loader unpacks into /tmp, and holds Python's lock while the network runs, so that no other thread of this
process would get on: no camera, no decoder, no view.
"""

from __future__ import annotations

import _ctypes
import ctypes
import io
import os
import zipfile
from contextlib import ExitStack
from ctypes import byref, c_char_p, c_size_t, c_void_p
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from espmedsam_edge.bundle import Graph
from espmedsam_edge.errors import UserError
from espmedsam_edge.files import temporary_folder
from espmedsam_edge.runtime.inductor.building import Device

# Not the variant for several threads: that asks for events of earlier runs, which no CUDA graph may.
_RUN = "AOTInductorModelContainerRunSingleThreaded"
_CREATE, _DELETE = "AOTInductorModelContainerCreateWithDevice", "AOTInductorModelContainerDelete"


def load_package(content: bytes, graph: Graph, device: Device) -> Package:
    """Load a compiled network.

    Args:
        content: the package as torch made it, checked: its native code runs in this process.
        graph: what it is of.
        device: what it was compiled for.

    Raises:
        UserError: it is none, or torch does not load it.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            files = {PurePosixPath(name).name: name for name in archive.namelist()}
            libraries = [archive.read(name) for file, name in files.items() if file.endswith(".so")]
            kernels = {file: archive.read(name) for file, name in files.items() if file.endswith((".cubin", ".fatbin"))}
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise _refused(graph, f"it is damaged ({error})") from error
    if len(libraries) != 1:
        raise _refused(graph, f"it holds {len(libraries)} libraries")
    return Package(libraries[0], kernels, graph, device)


class Package:
    """A compiled network in this process. Used by one thread at a time."""

    def __init__(self, library: bytes, kernels: dict[str, bytes], graph: Graph, device: Device) -> None:
        self._graph = graph
        self._container = c_void_p()
        # The GPU's kernels are read when each first runs: the folder is there until ``warm``.
        self._opened = ExitStack()
        folder = self._opened.enter_context(temporary_folder())
        for name, kernel in kernels.items():
            (folder / name).write_bytes(kernel)
        # From memory: what is loaded is what was checked, whatever happens to files meanwhile, on any file system. By a
        # name of its own, since the system's loader takes a name that it has seen for the library that had it then.
        descriptor = os.memfd_create("espmedsam-network", os.MFD_CLOEXEC)
        try:
            with open(descriptor, "wb", closefd=False) as stream:
                stream.write(library)
            link = folder / f"{folder.name}.so"
            link.symlink_to(f"/proc/self/fd/{descriptor}")
            self._library = ctypes.CDLL(str(link))
        except OSError as error:
            raise _refused(graph, str(error)) from error
        finally:
            os.close(descriptor)
        for name, arguments in (
            (_CREATE, [c_void_p, c_size_t, c_char_p, c_char_p]),
            (_DELETE, [c_void_p]),
            (_RUN, [c_void_p, c_void_p, c_size_t, c_void_p, c_size_t, c_void_p, c_void_p]),
        ):
            getattr(self._library, name).argtypes = arguments
        if self._call(_CREATE, byref(self._container), 1, device.encode(), str(folder).encode()) != 0:
            raise _refused(graph, "torch cannot start it")

    def _call(self, name: str, *arguments: Any) -> int:
        return int(getattr(self._library, name)(*arguments))

    def run(self, image: Tensor, stream: int = 0) -> Tensor:
        """One run.

        Args:
            image: (B, 3, S, S) float32 on the device, C-contiguous.
            stream: of a GPU, where all of it is enqueued; 0: the default one.

        Returns:
            (B, 1, S/4, S/4) float32 on the device, new.

        Raises:
            UserError: the machine failed; torch has told why on standard error.
        """
        inputs = (c_void_p * 1)(_address(torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors([image])[0]))
        outputs = (c_void_p * 1)()
        if self._call(_RUN, self._container, inputs, 1, outputs, 1, stream or None, None) != 0:
            raise UserError(
                f"torch failed on the {self._graph.modality} {self._graph.precision} graph.",
                "If memory ran out, close other programs or export a smaller --image-size.",
                exit_code=1,
            )
        (logits,) = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs([_capsule(outputs[0])])
        return logits

    def run_on_host(self, image: NDArray[np.float32], threads: int) -> NDArray[np.float32]:
        """As ``run``, from and to NumPy's memory in place, with so many threads of the processor."""
        torch.set_num_threads(threads)  # of the thread that calls; each has its own number
        with torch.no_grad():
            logits = self.run(torch.from_numpy(image if image.flags.writeable else image.copy()))
        return np.asarray(logits.numpy())

    def warm(self) -> None:
        """What was loaded from files has been: they go. A second call does nothing."""
        self._opened.close()

    def close(self) -> None:
        """Free the network when nothing runs; a second call does nothing."""
        self.warm()
        if self._container:
            self._call(_DELETE, self._container)
            self._container = c_void_p()
            _ctypes.dlclose(self._library._handle)  # its weights are tens of megabytes


def _address(capsule: Any) -> int:
    """The pointer in one of Python's capsules, which is how torch hands pointers over."""
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = c_void_p, [ctypes.py_object, c_char_p]
    return int(get(capsule, None))


def _capsule(address: int | None) -> Any:
    make = ctypes.pythonapi.PyCapsule_New
    make.restype, make.argtypes = ctypes.py_object, [c_void_p, c_char_p, c_void_p]
    return make(address, None, None)


def _refused(graph: Graph, reason: str) -> UserError:
    return UserError(
        f"the compiled network of {graph.modality} {graph.precision} cannot be loaded: {reason}.",
        "Build it again: espmedsam-edge build BUNDLE --backend inductor --force",
        exit_code=1,
    )
