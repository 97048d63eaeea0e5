#!/bin/sh
# Makes the virtual environment that `make` works in: the newest Python >= 3.10 on PATH (or $PYTHON), one line when
# something is missing. Usage: tools/venv.sh FOLDER
set -eu
venv=$1

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# Runs, and is 3.10 or newer (a name on PATH may be a version manager's shim that only prints an error).
usable() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1
}

# Debian and Ubuntu keep the part of venv that installs pip in a package of its own.
has_venv() {
    "$1" -c 'import ensurepip, venv' >/dev/null 2>&1
}

options=
if [ -n "${PYTHON:-}" ]; then
    usable "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.10 or newer that runs. Name another one."
    candidates=$PYTHON
elif [ -e /etc/nv_tegra_release ] && usable /usr/bin/python3; then
    # JetPack's TensorRT module exists for the system's own Python only. Ubuntu 22.04's pip would build with the
    # system's old setuptools in such an environment.
    candidates=/usr/bin/python3
    options="--system-site-packages --upgrade-deps"
else
    candidates="python3.14 python3.13 python3.12 python3.11 python3.10 python3"
fi

python=
incomplete=
for candidate in $candidates; do
    usable "$candidate" || continue
    if has_venv "$candidate"; then
        python=$candidate
        break
    fi
    incomplete=${incomplete:-$candidate}
done

if [ -z "$python" ]; then
    [ -n "$incomplete" ] || fail "found no Python 3.10 or newer on PATH. Install python3, or run: make PYTHON=/path/to/python3"
    version=$("$incomplete" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    package=python$version-venv
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        echo "$incomplete cannot make virtual environments yet; installing $package with apt-get."
        export DEBIAN_FRONTEND=noninteractive
        { apt-get -qq update && apt-get -qq install --yes --no-install-recommends "$package"; } >/dev/null ||
            fail "apt-get could not install $package. Install it, then run make again."
    fi
    has_venv "$incomplete" ||
        fail "$incomplete cannot make virtual environments. Install its venv, then run make again: sudo apt-get install $package"
    python=$incomplete
fi

echo "Making $venv with $("$python" -c 'import sys; print("Python %d.%d.%d, %s" % (*sys.version_info[:3], sys.executable))')"
# A folder without a Python that runs is the rest of an attempt that was cut short, or of a Python since removed.
"$python" -m venv --clear $options "$venv" || {
    rm -rf "$venv"
    fail "$python -m venv $venv failed; its own message is above."
}
