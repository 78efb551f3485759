# Determined sources this in every container, on every start, before the entrypoint. It installs what requirements.txt
# asks for beside two packages that must stay as they are: the image's torch, built for its CUDA, and the determined
# that the cluster put there, which speaks its master's language. When all is there already, pip only looks.
kept_packages=$(mktemp)
wanted_packages=$(mktemp)
python3 -m pip freeze 2>/dev/null | grep -iE '^(torch|determined)==' >"$kept_packages" || true
grep -vE '^(torch|determined)[<>=]' requirements.txt >"$wanted_packages"
python3 -m pip install -q --disable-pip-version-check -r "$wanted_packages" -c "$kept_packages" || {
  echo "startup-hook.sh: the packages of requirements.txt could not be installed, see pip's message above" >&2
  exit 1
}
rm -f "$kept_packages" "$wanted_packages"
