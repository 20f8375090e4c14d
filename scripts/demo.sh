#!/usr/bin/env bash
# The main job on the model that the repository ships: generate from a prompt with the 16-bit and with the 2-bit cache, and measure
# both on the same text, beside our 3 bits and RotateKV. Everything is left in build/demo/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

rotunda=build/cpu-release/rotunda
model=models/tiny-gqa
calibration_text=assets/calibration.txt
evaluation_text=assets/wikitext2_test_head.txt
out=build/demo
specs=(bf16 rotunda2)
compared=(bf16 rotunda3 rotunda2 rotate2)
new_tokens=64
windows=8  # of 2047 tokens each: enough to tell the caches apart, and done in a minute

for needed in "$rotunda" "$model/config.json" "$model/model.safetensors" "$calibration_text" "$evaluation_text"; do
  [[ -f $needed ]] || { echo "demo: $needed is missing" >&2; exit 1; }
done
rm -rf "$out"
mkdir -p "$out"
started=$SECONDS
step() { printf '\n== %s\n' "$1"; }

# About a thousand tokens of an encyclopaedia article: long enough for most of the cache to be packed, and more than its
# exact window of the newest tokens. Cut within a sentence, so that there is one to go on with.
head -c 4000 "$evaluation_text" | sed '$ s/ [^ ]*$//' > "$out/prompt.txt"
for spec in "${specs[@]}"; do
  step "Generate: rotunda generate $model --prompt-file $out/prompt.txt --kv $spec"
  "$rotunda" generate "$model" --prompt-file "$out/prompt.txt" --kv "$spec" --max-new-tokens "$new_tokens" --json "$out/generate-$spec.json"
done

# Of these rotate2 alone cannot do without a calibration; the others take what they want to know from the weights.
step "Calibrate, for rotate2: rotunda calibrate $model --text $calibration_text --out $out/calibration.safetensors --formats rotate2"
"$rotunda" calibrate "$model" --text "$calibration_text" --out "$out/calibration.safetensors" --formats rotate2

evaluate() { # KV OUT [ARGUMENTS]
  local kv=$1 json=$2
  shift 2
  step "Evaluate: rotunda eval ppl $model --text $evaluation_text --kv $kv --windows $windows $*"
  "$rotunda" eval ppl "$model" --text "$evaluation_text" --kv "$kv" --window-len 2048 --windows "$windows" --json "$json" "$@"
}
evaluate bf16,rotunda3,rotunda2 "$out/results.json"
evaluate rotate2 "$out/results-rotate2.json" --calibration "$out/calibration.safetensors"

step "Side by side"
.venv/bin/python -I scripts/demo_table.py "$out" "${compared[@]}"
echo
echo "Done in $((SECONDS - started)) s. Results: $out/results*.json and $out/generate-*.json"
