#!/bin/sh
# Installs what the tests of the browser, of a gateway, of MQTT, of Triton, of GStreamer and of DICOM need besides Python packages (Debian, Ubuntu), and lets the
# virtual environment see the system's PyGObject (`gi`), which no wheel brings. As an ordinary user it installs nothing
# and says what to type. What is missing then costs one line, and its tests are skipped. `make test-packages` runs it.
# Usage: tools/test_packages.sh VENV
set -u
venv=$1
gstreamer="python3-gi gir1.2-gst-plugins-base-1.0 gir1.2-gst-rtsp-server-1.0 gstreamer1.0-plugins-base
    gstreamer1.0-plugins-good gstreamer1.0-plugins-bad gstreamer1.0-plugins-ugly gstreamer1.0-libav gstreamer1.0-rtsp"

installed() {
    [ "$(dpkg-query --show --showformat='${db:Status-Status}\n' "$@" 2>/dev/null | grep -cx installed)" -eq $# ]
}

apt() {
    DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=60 -o Acquire::Retries=0 \
        -o Acquire::http::Timeout=20 "$@" >/dev/null 2>&1 </dev/null
}

install() {
    command="apt-get install --no-install-recommends $*"
    if ! command -v apt-get >/dev/null 2>&1; then
        echo "No apt-get here; tests are skipped that need what Debian calls: $*"
    elif [ "$(id -u)" != 0 ]; then
        echo "Some tests will be skipped. They need: sudo $command"
    else
        echo "Installing with apt-get, for tests: $*"
        { apt update && apt install --yes --no-install-recommends "$@"; } ||
            echo "That failed; the tests that need it are skipped. Its messages: $command"
    fi
}

# shellcheck disable=SC2086  # a list of words
installed $gstreamer || install $gstreamer
command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null ||
    install chromium
{ command -v dciodvfy && command -v storescu; } >/dev/null || install dicom3tools dcmtk
installed nginx-light mosquitto || install nginx-light mosquitto

# A server with its Python backend is in pytriton's wheel, which wants an older NumPy than we do.
triton=$venv-triton
if [ ! -e "$triton/.done" ]; then
    echo "Installing Triton into $triton, for tests (once; 0.7 GB)"
    {
        "$venv/bin/python" -m venv "$triton" &&
            "$triton/bin/python" -m pip --disable-pip-version-check --no-input install --quiet nvidia-pytriton==0.7.0 \
                'numpy<2' opencv-python-headless onnxruntime scipy pydantic typer rich platformdirs &&
            pwd >"$("$triton/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/espmedsam_edge.pth" &&
            touch "$triton/.done"
    } 2>/dev/null || echo "That failed; the tests that need Triton are skipped."
fi

"$venv/bin/python" -c 'import gi' 2>/dev/null && exit
gi=/usr/lib/python3/dist-packages/gi
[ -d $gi ] || exit 0
suffix=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
if [ -e "$gi/_gi$suffix" ]; then
    ln -sfn $gi "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/gi"
else
    echo "PyGObject is of the system's Python, not of the one in $venv: tests that read GStreamer in Python are skipped."
fi
