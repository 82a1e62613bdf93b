#!/usr/bin/env bash
# The wheel on Linux aarch64, under emulation: a digit drawn there from a bundle made here, and every artifact held against the original.
#
#   bash samples/checks/aarch64/run.sh            (or: make aarch64; on Debian, with qemu-user-static and debootstrap installed)
#
# ORT: the version to run. 1.23.2 is the last for JetPack 6's Python; 1.32.0 crashes under qemu 7.2 when it is imported.
set -euo pipefail
PYTHON=${PYTHON:-.venv/bin/python}
ORT=${ORT:-1.23.2}
OUT=build/aarch64
HERE=$(cd "$(dirname "$0")" && pwd)
for program in qemu-aarch64-static debootstrap dpkg; do
  command -v $program >/dev/null || { echo "$program is missing: apt-get install qemu-user-static debootstrap" >&2; exit 2; }
done
cli() { "$PYTHON" -c 'from elastic_export.cli import main; main()' "$@"; }
there() { PYTHONPATH=$OUT/site PYTHONHOME=$OUT/root/usr PYTHONDONTWRITEBYTECODE=1 qemu-aarch64-static -L $OUT/root $OUT/root/usr/bin/python3.11 "$@"; }

mkdir -p $OUT
if [ ! -e $OUT/root/usr/bin/python3.11 ]; then # Debian 12's own Python, unpacked and never configured: nothing is installed here
  rm -rf $OUT/root
  debootstrap --foreign --arch=arm64 --variant=minbase --include=python3,libgomp1,libstdc++6 bookworm $OUT/root http://deb.debian.org/debian >$OUT/debootstrap.log
  for package in $OUT/root/var/cache/apt/archives/*.deb; do dpkg -x "$package" $OUT/root; done
fi
rm -rf $OUT/site $OUT/wheel && "$PYTHON" -m build --wheel --outdir $OUT/wheel >$OUT/build.log
platforms=(--platform manylinux2014_aarch64)
for minor in 17 24 26 27 28 31 34 35 36; do platforms+=(--platform "manylinux_2_${minor}_aarch64"); done
"$PYTHON" -m pip install --quiet --disable-pip-version-check --only-binary=:all: --implementation cp --python-version 3.11 "${platforms[@]}" \
  --target $OUT/site $OUT/wheel/*.whl "onnxruntime==$ORT"
cli onnx elit-mnist -o $OUT/digits --overwrite --quiet >/dev/null
"$PYTHON" "$HERE/draw.py" $OUT/digits $OUT/here.npy
there "$HERE/draw.py" $OUT/digits $OUT/there.npy $OUT/here.npy
there -c 'from elastic_export.cli import main; main()' generate $OUT/digits -o $OUT/seven.png --classes 7 --steps 4 --latents 64 --overwrite
there -c 'from elastic_export.cli import main; main()' verify $OUT/digits
