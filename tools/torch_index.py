"""Print pip's option for the CPU build of torch where it is wanted and can be had, else nothing.

On Linux the registry's torch brings gigabytes of CUDA libraries. A machine without an NVIDIA GPU does not need them;
PyTorch's own index has a CPU build, which pip prefers (2.13.0+cpu is newer than 2.13.0). PLURES_TORCH_INDEX names
another index, or "none".
"""

import os
import platform
import shutil
import urllib.request

INDEX = "https://download.pytorch.org/whl/cpu"


def main() -> None:
    wanted = os.environ.get("PLURES_TORCH_INDEX", INDEX)
    if wanted == "none" or platform.system() != "Linux" or shutil.which("nvidia-smi"):
        return
    try:
        urllib.request.urlopen(f"{wanted}/torch/", timeout=3).close()
    except OSError:
        return  # no such index from here: the registry's torch will do
    print(f"--extra-index-url {wanted}")


main()
