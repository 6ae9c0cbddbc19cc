# What this runtime is, and what is missing here.
# The first cell of every notebook runs it. It installs on Colab only, and whatever is amiss
# it says in words, not by an error.
import glob
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys

# From setup.cfg, by colab/generate.py:
SOURCE, TENSORFLOW, OTHERS = "", "", ""
# The newest there is, behind TensorFlow itself; newer libtpu end its import.
TENSORFLOW_TPU = "tensorflow-tpu==2.20.0 libtpu==0.0.21.1"
FOLDER = "/content/tfamp-source"


def is_in(version, bounds):
    """Whether a version such as 2.20.0 is in >=2.19,<2.22."""
    least, beyond = (
        [int(n) for n in re.findall(r"\d+", bound)]
        for bound in bounds.split(",")
    )
    return least <= [int(n) for n in version.split(".")[:2]] < beyond


def look():
    """What is here, found out without importing TensorFlow."""
    gpu = ""
    if shutil.which("nvidia-smi"):
        query = ["--query-gpu=name,compute_cap", "--format=csv,noheader"]
        done = subprocess.run(["nvidia-smi", *query], capture_output=True)
        gpu = done.stdout.decode().split("\n")[0]
        gpu = gpu if re.fullmatch(r".+, \d+\.\d+", gpu) else "?"
    versions = {
        name: found.version
        for name in ("tensorflow", "tensorflow-tpu", "tfamp")
        for found in importlib.metadata.distributions(name=name)
    }
    try:
        colab = importlib.util.find_spec("google.colab") is not None
    except ModuleNotFoundError:  # Not even google.
        colab = False
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    return {
        "colab": colab,
        "gpu": gpu,  # "Tesla T4, 7.5"; "?" where the driver does not answer.
        "tpu": os.environ.get("TPU_ACCELERATOR_TYPE", ""),  # "v5e-1"
        "tpu_chips": len(chips),
        "versions": versions,  # Of what is installed.
    }


def advise(seen):
    """What that means, in lines, and what pip is to install for it."""
    for_speed = "For speed: Runtime > Change runtime type > GPU"
    pip = [["-e", f"{FOLDER}[recipes,report]"]]
    if seen["tpu"] and seen["tpu_chips"]:
        # With its requirements, tfamp would put TensorFlow over this one.
        pip = [[*TENSORFLOW_TPU.split(), *OTHERS.split()]]
        pip += [["--no-deps", "-e", FOLDER]]
        lines = [
            f"Runtime: TPU {seen['tpu']}. It computes in mixed_bfloat16, "
            "without loss scaling.",
            f"TensorFlow for TPUs lags: {TENSORFLOW_TPU.split()[0]}. On a "
            "TPU tfamp was never run, so this is a trial. Should it fail: "
            "Runtime > Change runtime type > GPU.",
        ]
    elif seen["tpu"] or seen["gpu"] == "?":
        lines = [
            f"Runtime: {'TPU' if seen['tpu'] else 'GPU'}, but it does not "
            "answer. Runtime > Disconnect and delete runtime, then connect "
            "again. Until then the cells run on the CPU.",
        ]
    elif seen["gpu"]:
        name, capability = seen["gpu"].rsplit(", ", 1)
        lines = [f"Runtime: {name}, compute capability {capability}."]
        if float(capability) >= 8:
            lines += ["Its precision: mixed_bfloat16, without loss scaling."]
        elif float(capability) >= 7:
            lines += ["Its precision: mixed_float16, with dynamic scaling."]
        else:
            lines += [
                "Its precision: float32. Tensor Cores came with 7.0; here 16 "
                f"bits save memory but no time. {for_speed}, T4 or newer."
            ]
        here = seen["versions"].get("tensorflow")
        if here is None or not is_in(here, TENSORFLOW):
            # Colab's own stays, and drives Colab's GPUs.
            pip[0] += [f"tensorflow[and-cuda]{TENSORFLOW}"]
    else:
        lines = [f"Runtime: CPU, seldom faster in 16 bits. {for_speed}."]
    here = " ".join(map(" ".join, seen["versions"].items())) or "no TensorFlow"
    lines += [f"Here: {here}. tfamp is tested with tensorflow{TENSORFLOW}."]
    if "tfamp" in seen["versions"]:
        return lines, []
    if seen["colab"]:
        return [*lines, "Installing tfamp takes a minute or three."], pip
    lines += [
        "tfamp is missing. This is not Colab, so nothing is installed: run "
        f"pip install -e '.[recipes,report]' in a clone of {SOURCE}"
    ]
    return lines, []


def enter_source():
    """Goes where tfamp and its recipes are, if that is a folder here."""
    for folder in (".", "..", FOLDER):
        if os.path.isfile(f"{folder}/recipes/__init__.py"):
            os.chdir(folder)
            sys.path.insert(0, os.getcwd())
            return


def name_devices(kind):
    """What TensorFlow sees; asked in a process of its own, as it may abort."""
    code = (
        "import tensorflow as tf; print('saw', tf.__version__, "
        f"len(tf.config.list_physical_devices('{kind}')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    if done.returncode:
        return "\n".join(
            ["TensorFlow cannot be used:", *done.stderr.split("\n")[-3:]]
        )
    _, version, count = done.stdout.split("\n")[-2].split()
    if int(count):
        return f"TensorFlow {version} sees {count} {kind}."
    return f"TensorFlow {version} sees no {kind}, and uses the CPU."


if __name__ == "__main__":
    seen = look()
    lines, pip = advise(seen)
    print(*lines, sep="\n")
    commands = [[sys.executable, "-m", "pip", "install", "-q", *p] for p in pip]
    if pip and not os.path.isdir(FOLDER):
        commands.insert(0, ["git", "clone", "-q", "--depth=1", SOURCE, FOLDER])
    for command in commands:
        if subprocess.run(command).returncode:
            print("This failed:", *command)
            break
    enter_source()
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"  # Warnings and errors.
    if importlib.util.find_spec("tfamp"):
        from tfamp.files.standard_error import start_tensorflow_quietly

        start_tensorflow_quietly()  # What it says shows where it fails.
    kind = "TPU" if seen["tpu_chips"] else "GPU" if seen["gpu"] else "CPU"
    if pip or kind != "CPU":
        print(name_devices(kind))
    if pip and "tensorflow" in sys.modules:
        print("An older TensorFlow is loaded: Runtime > Restart session.")
