#!/usr/bin/env bash
# On a CPU machine with the package index, in the repository's root: everything that a GPU machine without network needs, in build/gpu-kit.
#
#   bash samples/checks/gpu/pack.sh [wheels] [bundles] [cut]        all three where none is named; each leaves what it made for the next
#
# wheels   for the GPU machine's Python: ONNX Runtime for CUDA 13 (kernels of one GPU generation alone), msgspec, diffusers
# bundles  the product's own exports without their weights, which are packaged or made anew from their seed
# cut      compressed into build/gpu-kit/1, 2, ... of at most PART_MIB each
#
# PYTHON: one with the product installed. TAG: the GPU machine's Python. SM: 90 for H100 and H200. MODELS: random ones, with precisions.
set -euo pipefail
PYTHON=${PYTHON:-.venv/bin/python}
TAG=${TAG:-312}
SM=${SM:-90}
ORT=${ORT:-1.31.1}
PART_MIB=${PART_MIB:-45}
SAMPLES=${SAMPLES-elit-mnist dcdit-mnist elt-mnist elt-mnist-masked ralu-digits}
MODELS=${MODELS-elit-sit-xl-256:fp32,fp16 elit-sit-xl-512:fp16 elit-uvit-s-256:fp32,fp16 elit-hdit-s-256:fp32,fp16}
KIT=$(cd "$(dirname "$0")" && pwd)
OUT=build/gpu-kit
export ATEN_CPU_CAPABILITY=avx2 HF_HUB_OFFLINE=1
cli() { "$PYTHON" -c 'from elastic_export.cli import main; main()' "$@"; }

wheels() {
  rm -rf $OUT/work/{base,diffusers,raw}
  mkdir -p $OUT/work/{wheels,base,diffusers,raw}
  local platforms=(--platform manylinux2014_x86_64)
  for minor in 17 24 27 28 31 34 35 39; do platforms+=(--platform "manylinux_2_${minor}_x86_64"); done
  "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version "$TAG" --implementation cp \
    "${platforms[@]}" --dest $OUT/work/wheels "onnxruntime-gpu==$ORT" msgspec diffusers
  "$PYTHON" -m pip install --quiet --disable-pip-version-check --target $OUT/work/tools --upgrade zstandard lz4
  unzip -q $OUT/work/wheels/onnxruntime_gpu-"$ORT"-*.whl -d $OUT/work/raw
  (cd $OUT/work/raw && rm -rf onnxruntime/{tools,transformers,quantization,datasets} onnxruntime/ThirdPartyNotices.txt \
    onnxruntime/capi/libonnxruntime.so.* onnxruntime/capi/libonnxruntime_providers_tensorrt.so)
  # Kernels of language models' mixtures of experts, in bfloat16 alone and of decoding are for other graphs than ours.
  PYTHONPATH=$OUT/work/tools "$PYTHON" "$KIT/prune.py" $OUT/work/raw/onnxruntime/capi/libonnxruntime_providers_cuda.so "$SM" \
    $OUT/work/provider.so onnxruntime3llm MoeFCGemm MixedInput fpA_intB moe_ MoE Moe bfloat16 BFloat16 kernel_mha
  mv $OUT/work/provider.so $OUT/work/raw/onnxruntime/capi/libonnxruntime_providers_cuda.so
  rm -rf $OUT/work/ort && mv $OUT/work/raw $OUT/work/ort
  unzip -q -o $OUT/work/wheels/msgspec-*.whl -d $OUT/work/base
  unzip -q -o $OUT/work/wheels/diffusers-*.whl -d $OUT/work/diffusers
  find $OUT/work -name __pycache__ -prune -exec rm -rf {} +
}

bundles() {
  rm -rf $OUT/work/bundles && mkdir -p $OUT/work/bundles $OUT/work/whole
  local entry model precision random
  for entry in $SAMPLES $MODELS; do
    model=${entry%%:*} random=()
    [[ $entry == *:* ]] && random=(--random-weights --batch 1-16 --verify ends) || entry=$model:fp32,fp16
    for precision in $(tr , ' ' <<<"${entry#*:}"); do
      cli onnx "$model" "${random[@]}" --precision "$precision" -o "$OUT/work/whole/$model" --overwrite --quiet
    done
    "$PYTHON" "$KIT/hollow.py" strip "$OUT/work/whole/$model" "$OUT/work/bundles/$model"
    rm -rf "$OUT/work/whole/$model" # gigabytes, and they come back from their seed
  done
}

# One stream of archives, the most valuable first, in parts that fit a transfer.
cut_up() {
  local name file size at part number=1 free=$((PART_MIB * 1048576)) take
  rm -rf $OUT/[0-9]* $OUT/work/archives && mkdir -p $OUT/1 $OUT/work/archives
  tar -C $OUT/work -cf - bundles | xz --x86 --lzma2=preset=9e >$OUT/work/archives/bundles.tar.xz
  for name in base ort diffusers; do tar -C "$OUT/work/$name" -cf - . | xz --x86 --lzma2=preset=9e >"$OUT/work/archives/$name.tar.xz"; done
  for name in bundles base ort diffusers; do
    file=$OUT/work/archives/$name.tar.xz at=0 part=0
    size=$(stat -c %s "$file")
    while ((at < size)); do
      ((free > 1048576)) || { number=$((number + 1)) free=$((PART_MIB * 1048576)) && mkdir -p $OUT/$number; }
      take=$((size - at < free ? size - at : free))
      tail -c +$((at + 1)) "$file" | head -c $take >"$OUT/$number/$name.tar.xz.$(printf %02d $part)" || true
      at=$((at + take)) part=$((part + 1)) free=$((free - take))
    done
    echo "$size $part $(sha256sum "$file" | cut -d' ' -f1)" >"$OUT/work/archives/$name.sum"
  done
  for ((; number > 0; number--)); do cp $OUT/work/archives/*.sum $OUT/$number/; done
  du -sm $OUT/[0-9]*
}

mkdir -p $OUT/work
for step in ${*:-wheels bundles cut}; do
  echo "== $step"
  case $step in wheels) wheels ;; bundles) bundles ;; cut) cut_up ;; *) echo "no step $step: wheels, bundles or cut" >&2 && exit 2 ;; esac
done
