# Determined sources this file in every container, at every start, before the entrypoint. It installs the packages of
# requirements.txt that the image lacks. Two packages keep their version: the image's torch, which is built for its
# CUDA, and the determined that the cluster installed, which matches its master. If nothing is missing, pip is not run.
# Dockerfile runs it as well, when an image is built.
kept_packages=$(mktemp)
wanted_packages=$(mktemp)
python3 - "$kept_packages" "$wanted_packages" <<'PYTHON' || exit 1
import json
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    from packaging.requirements import Requirement
except ImportError:
    from pip._vendor.packaging.requirements import Requirement

if sys.version_info < (3, 11):
    found = ".".join(map(str, sys.version_info[:2]))
    sys.exit(f"startup-hook.sh: the image has Python {found}, but 3.11 or newer is needed; choose another environment.image")
kept, wanted = [], []
lines = Path("requirements.txt").read_text().splitlines()
if json.loads(os.environ.get("DET_HPARAMS") or "{}").get("load_in_4bit"):
    lines.append("bitsandbytes>=0.46")  # not for all: it has 60 MB, and each start would import it for a second
for line in lines:
    text = line.partition("#")[0].strip()
    if not text:
        continue
    requirement = Requirement(text)
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        found = None
    fits = found is not None and requirement.specifier.contains(found, prereleases=True)
    if requirement.name == "torch" and not fits:
        sys.exit(f"startup-hook.sh: the image has torch {found}, but {text} is needed; choose another environment.image")
    if requirement.name in ("torch", "determined"):
        kept += [f"{requirement.name}=={found}"] if found else []
    elif not fits:
        wanted.append(text)
for path, lines in zip(sys.argv[1:], (kept, wanted)):
    Path(path).write_text("".join(line + "\n" for line in lines))
PYTHON
if [ -s "$wanted_packages" ]; then
  # In one call, so that pip resolves all versions before it installs anything.
  python3 -m pip install -q --disable-pip-version-check -r "$wanted_packages" -c "$kept_packages" || {
    echo "startup-hook.sh: could not install $(tr '\n' ' ' <"$wanted_packages")(pip says why, above)" >&2
    exit 1
  }
fi
rm -f "$kept_packages" "$wanted_packages"
# Another user's containers may have made HF_HOME on this agent. The entrypoint inherits the choice.
if [ -n "${HF_HOME:-}" ]; then
  HF_HOME=$(python3 -m storage.hf_home) || exit 1
  export HF_HOME
fi
