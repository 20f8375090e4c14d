#!/usr/bin/env bash
# The main job on the model that the repository ships: learn what the 2-bit cache wants to know of the model, generate from
# a prompt with the 16-bit and with the 2-bit cache, and measure both on the same text. Everything is left in build/demo/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

rotunda=build/cpu-release/rotunda
model=models/tiny-gqa
calibration_text=assets/calibration.txt
evaluation_text=assets/wikitext2_test_head.txt
out=build/demo
specs=(bf16 rotate2)
new_tokens=64
windows=8  # of 2047 tokens each: enough to tell the caches apart, and done in a minute

for needed in "$rotunda" "$model/config.json" "$model/model.safetensors" "$calibration_text" "$evaluation_text"; do
  [[ -f $needed ]] || { echo "demo: $needed is missing" >&2; exit 1; }
done
rm -rf "$out"
mkdir -p "$out"
started=$SECONDS
step() { printf '\n== %s\n' "$1"; }

step "Calibrate: rotunda calibrate $model --text $calibration_text --out $out/calibration.safetensors"
"$rotunda" calibrate "$model" --text "$calibration_text" --out "$out/calibration.safetensors"

# About a thousand tokens of an encyclopaedia article: long enough for most of the cache to be packed, and more than its
# exact window of the newest tokens. Cut within a sentence, so that there is one to go on with.
head -c 4000 "$evaluation_text" | sed '$ s/ [^ ]*$//' > "$out/prompt.txt"
for spec in "${specs[@]}"; do
  step "Generate: rotunda generate $model --prompt-file $out/prompt.txt --kv $spec"
  "$rotunda" generate "$model" --prompt-file "$out/prompt.txt" --kv "$spec" --calibration "$out/calibration.safetensors" \
    --max-new-tokens "$new_tokens" --json "$out/generate-$spec.json"
done

joined=$(IFS=,; echo "${specs[*]}")
step "Evaluate: rotunda eval ppl $model --text $evaluation_text --kv $joined --windows $windows"
"$rotunda" eval ppl "$model" --text "$evaluation_text" --kv "$joined" --calibration "$out/calibration.safetensors" \
  --window-len 2048 --windows "$windows" --json "$out/results.json"

step "Both caches side by side"
.venv/bin/python -I scripts/demo_table.py "$out" "${specs[@]}"
echo
echo "Done in $((SECONDS - started)) s. Results: $out/results.json and $out/generate-*.json"
