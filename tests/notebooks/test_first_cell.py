"""The setup cell: what it says and does on runtimes that are not here."""

import configparser
import stat
import subprocess
import sys
import textwrap

import pytest
from packaging.requirements import Requirement

import tfamp
from colab import generate
from tfamp.hardware.devices import KNOWN_HARDWARE

NOTHING = {
    "colab": True,
    "gpu": "",
    "tpu": "",
    "tpu_chips": 0,
    "versions": {"tensorflow": "2.18.0"},
}


@pytest.fixture(scope="module")
def cell():
    """What the cell defines; it acts only as a notebook's `__main__`."""
    names = {"__name__": "setup"}
    exec(generate.first_cell(), names)
    return names


@pytest.fixture
def advise(cell):
    """Takes what differs from a CPU runtime; gives the words, and for pip."""

    def ask(**seen):
        lines, pip = cell["advise"](NOTHING | seen)
        return "\n".join(lines), [" ".join(arguments) for arguments in pip]

    return ask


def test_a_cpu_runtime_is_told_what_is_installed(advise):
    words, pip = advise()
    assert "Runtime: CPU" in words
    assert "Here: tensorflow 2.18.0. tfamp is tested with " in words
    assert pip == ["-e /content/tfamp-source[recipes,report]"]


@pytest.mark.parametrize("name", ["P100", "V100", "T4", "A100", "L4", "H100"])
def test_a_gpu_gets_the_precision_that_tfamp_recommends(advise, name):
    gpu = KNOWN_HARDWARE[name]
    capability = "{}.{}".format(*gpu.compute_capability)

    words, pip = advise(gpu=f"{gpu.device_names[0]}, {capability}")

    advice = tfamp.recommend(gpu)
    assert f"Its precision: {advice.precision}" in words
    assert ("dynamic" in words) == (advice.loss_scaling == "dynamic")
    (arguments,) = pip
    assert "tensorflow[and-cuda]>=2.19,<2.22" in arguments


def test_the_tensorflow_that_colab_has_stays(advise):
    here = {"tensorflow": "2.20.0"}
    _, pip = advise(gpu="Tesla T4, 7.5", versions=here)
    assert pip == ["-e /content/tfamp-source[recipes,report]"]


def test_an_old_gpu_is_told_what_that_means(advise):
    words, _ = advise(gpu="Tesla K80, 3.7")
    assert "Tesla K80, compute capability 3.7" in words
    assert "Tensor Cores came with 7.0; here 16 bits save memory" in words
    assert "T4 or newer" in words


def test_a_tpu_gets_the_tensorflow_for_tpus_and_no_other(advise):
    words, pip = advise(tpu="v5e-1", tpu_chips=1, versions={})
    assert "Here: no TensorFlow" in words
    assert "On a TPU tfamp was never run" in words
    first, second = pip
    assert first.startswith("tensorflow-tpu==2.20.0 libtpu==0.0.21.1 absl-py>=")
    names = [Requirement(each).name for each in first.split()]
    assert "tensorflow" not in names
    assert {"keras", "rich", "tensorflow-datasets", "matplotlib"} <= set(names)
    assert second == "--no-deps -e /content/tfamp-source"


def test_a_tpu_runtime_without_a_tpu_goes_on_with_its_cpu(advise):
    words, pip = advise(tpu="v5e-1", versions={})
    assert "Runtime: TPU, but it does not answer" in words
    assert "run on the CPU" in words
    assert pip == ["-e /content/tfamp-source[recipes,report]"]


def test_nothing_is_installed_where_tfamp_is(advise):
    here = {"tensorflow": "2.21.0", "tfamp": "0.1.0"}
    words, pip = advise(versions=here)
    assert "Here: tensorflow 2.21.0 tfamp 0.1.0" in words
    assert pip == []


def test_nothing_is_installed_on_another_machine_than_colab(advise):
    words, pip = advise(colab=False)
    assert "nothing is installed: run pip install -e" in words
    assert pip == []


def test_pins_are_those_of_the_package(cell):
    setup = configparser.ConfigParser()
    setup.read(generate.FOLDER.parent / "setup.cfg")
    lists = (
        setup["options"]["install_requires"],
        setup["options.extras_require"]["recipes"],
        setup["options.extras_require"]["report"],
    )
    wanted = {
        Requirement(line)
        for line in "\n".join(lists).split("\n")
        if line and line[0] != "#"
    }
    pins = [*cell["OTHERS"].split(), f"tensorflow{cell['TENSORFLOW']}"]
    assert set(map(Requirement, pins)) == wanted


class Machine:
    """A machine made of fakes: what is on PATH, importable and in /dev."""

    def __init__(self, folder):
        self.place = ""
        self._folder = folder
        self._environment = {}
        for name in ("bin", "modules", "dev/vfio", "work"):
            (folder / name).mkdir(parents=True)

    def add_colab(self):
        (self._folder / "modules/google/colab").mkdir(parents=True)
        (self._folder / "modules/google/colab/__init__.py").touch()
        # Makes what git would bring.
        source = self._folder / "content/tfamp-source"
        self.add_program(
            "git",
            f'echo "git $*"; mkdir -p {source}/recipes; '
            f"touch {source}/recipes/__init__.py",
        )

    def add_pip(
        self, version="2.21.0", devices=("CPU",), tensorflow="", status=0
    ):
        """It says what it was given, and brings a TensorFlow."""
        text = tensorflow or _tensorflow(version, devices)
        program = f"""
            import pathlib, sys
            print("pip", *sys.argv[1:])
            module = pathlib.Path(__file__).parent / "tensorflow.py"
            module.write_text({text!r})
            sys.exit({status})
        """
        (self._folder / "modules/pip.py").write_text(textwrap.dedent(program))

    def add_tensorflow(self, version="2.18.0", devices=("CPU",)):
        text = _tensorflow(version, devices)
        (self._folder / "modules/tensorflow.py").write_text(text)
        info = self._folder / f"modules/tensorflow-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: tensorflow\nVersion: {version}\n"
        )

    def add_nvidia_smi(self, output="", status=0):
        self.add_program("nvidia-smi", f'echo "{output}"; exit {status}')

    def add_tpu(self, device="vfio/0"):
        self._environment["TPU_ACCELERATOR_TYPE"] = "v5e-1"
        if device:
            (self._folder / "dev" / device).touch()

    def add_program(self, name, script):
        path = self._folder / "bin" / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def run(self):
        """What the cell prints, and what the programs that it starts do."""
        text = generate.first_cell()
        for old, new in (("/dev/", "dev/"), ("/content/", "content/")):
            assert old in text
            text = text.replace(f'"{old}', f'"{self._folder}/{new}')
        text = (
            "import sys\nsys.stdout.reconfigure(line_buffering=True)\n" + text
        )
        text += "\nprint('in', os.getcwd(), 'of', sys.path[0])\n"
        # -S: no site-packages, so no TensorFlow and no tfamp but the fakes.
        (self._folder / "cell.py").write_text(
            text.replace('[sys.executable, "-', '[sys.executable, "-S", "-')
        )
        done = subprocess.run(
            [sys.executable, "-S", str(self._folder / "cell.py")],
            cwd=self._folder / "work",
            env={
                "PATH": f"{self._folder}/bin:/usr/bin:/bin",
                "PYTHONPATH": f"{self._folder}/modules",
                "HOME": str(self._folder),
                **self._environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        assert "Traceback" not in done.stdout
        printed, _, self.place = done.stdout.replace(
            str(self._folder), ""
        ).rpartition("in ")
        return printed


def _tensorflow(version, devices):
    return f"""
import types
__version__ = {version!r}
config = types.SimpleNamespace(
    list_physical_devices=lambda kind: [
        device for device in {devices!r} if device == kind
    ]
)
"""


@pytest.fixture
def machine(tmp_path):
    # No space: a shell script has the path in it.
    return Machine(tmp_path)


def test_off_colab_without_tensorflow_it_says_so_and_installs_nothing(machine):
    printed = machine.run()
    assert "Runtime: CPU" in printed
    assert "Here: no TensorFlow" in printed
    assert "This is not Colab, so nothing is installed" in printed


def test_on_colab_it_clones_installs_and_goes_there(machine):
    machine.add_colab()
    machine.add_pip()

    printed = machine.run()

    assert (
        "git clone -q --depth=1 https://github.com/tfamp/tfamp "
        "/content/tfamp-source\n"
        "pip install -q -e /content/tfamp-source[recipes,report]\n"
        "TensorFlow 2.21.0 sees 1 CPU.\n"
    ) in printed
    source = "/content/tfamp-source"
    assert machine.place == f"{source} of {source}\n"


def test_on_colab_with_a_new_gpu(machine):
    machine.add_colab()
    machine.add_tensorflow(devices=("CPU", "GPU"))
    machine.add_pip(devices=("CPU", "GPU"))
    machine.add_nvidia_smi("NVIDIA A100-SXM4-40GB, 8.0")

    printed = machine.run()

    assert "Runtime: NVIDIA A100-SXM4-40GB, compute capability 8.0." in printed
    assert "Here: tensorflow 2.18.0. tfamp is tested with" in printed
    assert "tensorflow[and-cuda]>=2.19,<2.22\n" in printed
    assert printed.endswith("TensorFlow 2.21.0 sees 1 GPU.\n")


def test_on_colab_with_an_old_gpu(machine):
    machine.add_colab()
    machine.add_pip(devices=("CPU",))
    machine.add_nvidia_smi("Tesla P100-PCIE-16GB, 6.0")

    printed = machine.run()

    assert "Its precision: float32. Tensor Cores came with 7.0" in printed
    assert printed.endswith("sees no GPU, and uses the CPU.\n")


@pytest.mark.parametrize(
    ("output", "status"), [("no devices", 9), ("Tesla T4, [N/A]", 0)]
)
def test_on_colab_with_a_gpu_that_does_not_answer(machine, output, status):
    machine.add_colab()
    machine.add_pip()
    machine.add_nvidia_smi(output, status)

    printed = machine.run()

    assert "Runtime: GPU, but it does not answer." in printed
    assert printed.endswith("sees no GPU, and uses the CPU.\n")


@pytest.mark.parametrize("device", ["vfio/0", "accel0"])
def test_on_colab_with_a_tpu(machine, device):
    machine.add_colab()
    machine.add_tpu(device)
    machine.add_pip("2.20.0", devices=("CPU", "TPU"))

    printed = machine.run()

    assert "Runtime: TPU v5e-1." in printed
    assert "pip install -q tensorflow-tpu==2.20.0 libtpu==" in printed
    assert "pip install -q --no-deps -e /content/tfamp-source\n" in printed
    assert printed.endswith("TensorFlow 2.20.0 sees 1 TPU.\n")


def test_on_colab_that_says_tpu_and_has_none(machine):
    machine.add_colab()
    machine.add_tpu(device="")
    machine.add_pip()

    printed = machine.run()

    assert "Runtime: TPU, but it does not answer." in printed
    assert printed.endswith("TensorFlow 2.21.0 sees 1 CPU.\n")


def test_an_installation_that_fails_ends_in_words(machine):
    machine.add_colab()
    machine.add_pip(
        tensorflow="raise ImportError(\"No module named 'tensorflow'\")",
        status=1,
    )

    printed = machine.run()

    failed, _, after = printed.partition("This failed: ")[2].partition("\n")
    assert failed.endswith(
        "pip install -q -e /content/tfamp-source[recipes,report]"
    )
    assert "TensorFlow cannot be used" in after
    assert "No module named 'tensorflow'" in after


def test_a_tensorflow_that_aborts_does_not_take_the_cell_with_it(machine):
    machine.add_colab()
    machine.add_pip(tensorflow="import os; os.abort()")

    assert "TensorFlow cannot be used:" in machine.run()
