"""The committed layout, the wheel, and living beside Hugging Face's package named kernels.

Python makes a namespace package of any folder it finds under the name, so `import kernels` from
the checkout may succeed with nothing in it. What must hold, and is tested: ours is never a regular
package, a regular one wins from anywhere on the path, and transformers sees what it sees elsewhere.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import fastbert

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
NOT_SOURCE = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
CORE = {"torch", "numpy", "tokenizers", "safetensors", "tqdm"}


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed, run without this process's PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout.strip()


def modules() -> list[str]:
    """Every source file as a wheel must hold it, the links resolved to where they install."""
    paths = [
        path.relative_to(ROOT).as_posix()
        for folder in ("fastbert", "kernels", "bench")
        for path in (ROOT / folder).rglob("*.py")
        if not path.relative_to(ROOT).is_relative_to("fastbert/kernels")
        and not path.relative_to(ROOT).is_relative_to("fastbert/bench")
    ]
    return sorted(p if p.startswith("fastbert/") else f"fastbert/{p}" for p in paths)


@pytest.mark.parametrize("folder", ["kernels", "bench"])
def test_no_init_file_makes_a_package_of_a_top_level_folder(folder):
    assert not list((ROOT / folder).rglob("__init__.py"))


def test_tests_are_flat_modules():
    assert not list((ROOT / "tests").rglob("__init__.py"))


@pytest.mark.parametrize("folder", ["kernels", "bench"])
def test_the_links_are_links_and_committed(folder):
    link = ROOT / "fastbert" / folder
    assert link.is_symlink() and os.readlink(link) == f"../{folder}"
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout: what is committed cannot be seen")
    staged = run("git", "ls-files", "--stage", f"fastbert/{folder}", cwd=ROOT)
    assert staged.startswith("120000 ") and len(staged.splitlines()) == 1


def test_one_version():
    with open(ROOT / "pyproject.toml", "rb") as file:
        assert tomllib.load(file)["project"]["version"] == fastbert.__version__


def test_kernels_is_never_a_regular_package_of_ours():
    program = """if True:
        import importlib.util
        spec = importlib.util.find_spec("kernels")
        print("absent" if spec is None else spec.origin or "namespace")
    """
    origin = run(sys.executable, "-c", program, cwd=ROOT)
    if origin not in ("absent", "namespace"):
        assert ROOT not in Path(origin).parents


def test_a_regular_package_named_kernels_wins(tmp_path):
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("whose = 'theirs'\n")
    # last on the path, behind the checkout and everything installed
    program = (
        f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.whose)"
    )
    shadowed = "import importlib.util as u; s = u.find_spec('kernels'); print(bool(s and s.origin))"
    if run(sys.executable, "-c", shadowed, cwd=tmp_path.parent) == "True":
        pytest.skip("a package named kernels is installed, which comes before this one")
    assert run(sys.executable, "-c", program, cwd=ROOT) == "theirs"


def test_transformers_sees_the_same_from_the_checkout(tmp_path):
    pytest.importorskip("transformers", reason="transformers comes with the test extra")
    program = """if True:
        from transformers import BertConfig, BertModel
        from transformers.utils import is_kernels_available
        BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                             intermediate_size=8, vocab_size=9, max_position_embeddings=9))
        print(is_kernels_available())
    """
    elsewhere = run(sys.executable, "-c", program, cwd=tmp_path)
    assert run(sys.executable, "-c", program, cwd=ROOT) == elsewhere


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> dict[str, Path]:
    """A source distribution of this checkout, and the wheel built from that."""
    pytest.importorskip("build", reason="build comes with the test extra")
    folder = tmp_path_factory.mktemp("distributions")
    source = shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=NOT_SOURCE)
    run(
        *(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", source),
        # the checkout must not be importable while its copy is built
        cwd=folder,
    )
    return {
        "sdist": next((folder / "dist").glob("*.tar.gz")),
        "wheel": next((folder / "dist").glob("*.whl")),
    }


def test_the_source_distribution_is_whole(distributions):
    with tarfile.open(distributions["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for wanted in ("LICENSE", "README.md", "setup.py", "kernels/ops.py", "fastbert/py.typed"):
        assert wanted in names


def test_the_wheel_holds_the_library_and_nothing_else(distributions):
    with zipfile.ZipFile(distributions["wheel"]) as archive:
        names = set(archive.namelist())
    information = {name for name in names if ".dist-info/" in name}
    assert sorted(names - information) == sorted([*modules(), "fastbert/py.typed"])
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in information)


def test_the_wheel_says_what_it_is(distributions):
    with zipfile.ZipFile(distributions["wheel"]) as archive:
        read = {
            name.rpartition("/")[2]: archive.read(name).decode()
            for name in archive.namelist()
            if ".dist-info/" in name
        }
    metadata = Parser().parsestr(read["METADATA"])
    required = {
        line.split(">=")[0].strip()
        for line in metadata.get_all("Requires-Dist", [])
        if "extra ==" not in line
    }
    assert metadata["Version"] == fastbert.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert required == CORE
    assert read["top_level.txt"].split() == ["fastbert"]
    assert "fastbert = fastbert.cli:main" in read["entry_points.txt"]


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory) -> Path:
    """The bin folder of an environment that holds the wheel alone and borrows what it needs."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    binaries = folder / "venv" / "bin"
    install = ("install", "--no-index", "--no-deps", "--quiet", distributions["wheel"])
    run(sys.executable, "-m", "pip", "--python", binaries / "python", *install, cwd=folder)
    # torch is too big to install twice. a path file adds the folder but not its path files,
    # so that an editable install of the checkout stays out
    ours = next((folder / "venv").glob("lib/python*/site-packages"))
    theirs = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (ours / "borrowed.pth").write_text("\n".join(sorted(theirs)) + "\n")
    return binaries


def test_the_wheel_imports_from_where_it_is_installed(installed, tmp_path):
    names = [
        module.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for module in modules()
        if not module.startswith("fastbert/bench/") and not module.endswith("__main__.py")
    ]
    program = f"""if True:
        import importlib
        for name in {names}:
            print(importlib.import_module(name).__file__)
    """
    files = run(installed / "python", "-c", program, cwd=tmp_path).splitlines()
    assert len(files) == len(names)
    environment = installed.parent.resolve()
    assert all(environment in Path(file).resolve().parents for file in files), files


def test_the_wheel_runs_a_model(installed, tmp_path):
    program = """if True:
        import torch
        from fastbert.config import EncoderConfig
        from fastbert.models import BertForMaskedLM
        config = EncoderConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1,
                               num_attention_heads=2, intermediate_size=16)
        BertForMaskedLM.from_config(config).save_pretrained("model")
        model = BertForMaskedLM.from_pretrained("model")
        print(tuple(model(torch.tensor([[2, 5, 6, 3]])).logits.shape))
    """
    assert run(installed / "python", "-c", program, cwd=tmp_path) == "(1, 4, 11)"


def test_the_wheel_brings_the_command(installed, tmp_path):
    printed = run(installed / "fastbert", "--version", cwd=tmp_path)
    assert fastbert.__version__ in printed.split()
