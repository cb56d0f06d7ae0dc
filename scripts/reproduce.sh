#!/usr/bin/env bash
# Repeats a table: trains its rows, and prints it. What is trained already is not trained again.
#
#     bash scripts/reproduce.sh TABLE [--scale SCALE] [--data PATH] [--out FOLDER] [--seeds "0 1 2"] [--jobs N]
#
# TABLE   1 reconstruction, 2 generation, 3 StructTokenBench, 4 protein structures, 5 and 6 the paper's ablations;
#         core and rivals, which are not in the paper: RESULTS.md's first table, and other quantizers at one rate for
#         all, not tuned as in RESULTS.md
# SCALE   small    minutes to hours of a CPU (the default). 1, 5, 6, core, rivals: the evidence bed, --data CIFAR10
#                  images, 512 codes, one rate of 1e-3 for all and nothing tuned, so other numbers than README.md's;
#                  2: digits; 3: probes on what 4 has trained beside it, --data made by make_docking_tasks.py;
#                  4: generated backbones, or 600 steps on the structures in --data
#         confirm  days of a CPU. The evidence bed at 32x32; 2: CIFAR-10; 3: as small; 4: structures in --data
#         paper    prints the commands for 8 GPUs and runs none; the last one makes the table of what they have trained.
#                  --data ImageNet's folder of train/ and val/; 3 and 4: the archive, the cache of structures
# Table 4 validates on --data's val/ and trains on its train/ where it has these folders; else a tenth is held out.
# Rows called recluster or x10 (faster codes) are ours, not the paper's; 2 and 4 run them at every scale but the paper's.
# --jobs  runs of the evidence bed at the same time
set -euo pipefail

[[ " $* " != *" --help "* && " $* " != *" -h "* ]] || { sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit; }
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

fail() {
    echo "reproduce.sh: error: $1" >&2
    exit 2
}

table="${1:-}"
case "$table" in
    1 | 2 | 3 | 4 | 5 | 6 | core | rivals) shift ;;
    *) fail "the table is '$table'; it must be 1 to 6, core or rivals" ;;
esac
scale=small data= out= seeds="0 1 2" jobs=
while [ $# -gt 0 ]; do
    [ $# -ge 2 ] && [ -n "$2" ] || fail "$1 needs a value"
    case "$1" in
        --scale) scale="$2" ;;
        --data) data="$2" ;;
        --out) out="$2" ;;
        --seeds) seeds="$2" ;;
        --jobs) jobs="$2" ;;
        *) fail "unknown flag $1; there are --scale, --data, --out, --seeds and --jobs" ;;
    esac
    shift 2
done
case "$scale" in small | confirm | paper) ;; *) fail "--scale is '$scale'; it must be small, confirm or paper" ;; esac
numbers=()
for seed in ${seeds//[^0-9 ]/x}; do
    [[ "$seed" =~ ^(0|[1-9][0-9]{0,17})$ ]] || fail "--seeds is '$seeds'; it must be numbers such as \"0 1 2\""
    [[ " ${numbers[*]} " != *" $seed "* ]] || fail "--seeds is '$seeds'; it names $seed twice"
    numbers+=("$seed")
done
[ "${#numbers[@]}" -gt 0 ] || fail "--seeds is '$seeds'; it must be numbers such as \"0 1 2\""
case "$table-$scale" in
    [156]-small | [156]-confirm | core-* | rivals-*) ;;
    *) [ -z "$jobs" ] || fail "--jobs $jobs is for the evidence bed, on which table $table at scale $scale is not" ;;
esac
[[ "${jobs:=1}" =~ ^[1-9][0-9]*$ ]] || fail "--jobs is '$jobs'; it must be at least 1"
[ "$table-$scale" != 2-small ] || [ -z "$data" ] ||
    fail "--data $data: table 2 at the scale small is of scikit-learn's digits; leave it out, or use --scale confirm"
runs="$ROOT/runs"
[ "$scale" != paper ] || runs=runs
out="${out:-$runs/table-$table-$scale}"

run() { # a command, which the scale paper only shows
    if [ "$scale" = paper ]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

launch() { # a training, on 8 GPUs or on what is here
    if [ "$scale" = paper ]; then
        run torchrun --nproc_per_node=8 "$@"
    else
        run "$PYTHON" "$ROOT/$1" "${@:2}"
    fi
}

tool() { # a command of one process
    if [ "$scale" = paper ]; then
        run python "$@"
    else
        run "$PYTHON" "$ROOT/$1" "${@:2}"
    fi
}

bed() { # arms...: on the evidence bed, and their table
    [ -n "$data" ] || fail "--data is missing: the images of the evidence bed, such as cifar10_train.zip"
    local side=16
    [ "$scale" != confirm ] || side=32
    tool evaluations/evidence/run.py "$data" --bed "$scale" --jobs "$jobs" --seeds "${numbers[@]}" --arms "$@" \
        --out "$out/results.jsonl"
    # The file may hold the other scale's runs.
    tool evaluations/evidence/table.py "$out/results.jsonl" --arms "$@" --seeds "${numbers[@]}" --image-size "$side" \
        --metrics psnr ssim codes_used perplexity code_distance --out "$out/table.md" --figure "$out/table.png"
}

# What each row of a table adds to the trainers' defaults, which are ProVQ's.
flags_of() {
    case "$1" in
        *-x10) echo "$(flags_of "${1%-x10}") --codebook-lr-scale 10" ;;
        provq) ;;
        recluster) echo --recluster ;;
        vanilla) echo --warmup-steps 0 --transition-steps 0 ;;
        llamagen) echo --warmup-steps 0 --transition-steps 0 --codebook-l2-norm ;;
        soft) echo --warmup-steps 0 ;;
        warmup) echo --transition-steps 0 ;;
        adaptive) echo --transition-steps 0 --adaptive-warmup-patience 3 ;;
        simvq) echo --quantizer simvq --warmup-steps 0 --transition-steps 0 ;;
        simvq-soft) echo --quantizer simvq --warmup-steps 0 ;;
        aminoaseed) echo --quantizer aminoaseed --warmup-steps 0 --transition-steps 0 ;;
        aminoaseed-provq) echo --quantizer aminoaseed ;;
        aminoaseed-recluster) echo --quantizer aminoaseed --recluster ;;
        linear | exp | hard) echo --transition "$1" ;;
        lambda-*) echo --loss-lambda "${1#lambda-}" ;;
    esac
}

images() { # rows...: image tokenizers of every seed
    local -a data_flags=()
    case "$scale" in
        small) data_flags=(--preset digits --ema --ema-decay 0.98) ;; # see RESULTS.md, Digits
        confirm) data_flags=(--preset cifar10 --data-path "${data:-cifar10}") ;;
        paper) data_flags=(--preset imagenet256 --data-path "$data/train" --val-path "$data/val") ;;
    esac
    for row in "$@"; do
        for seed in "${numbers[@]}"; do
            # shellcheck disable=SC2046  # several words
            launch tokenizer/train_provq.py "${data_flags[@]}" $(flags_of "$row") --global-seed "$seed" \
                --results-dir "$out/$row-s$seed"
        done
    done
}

collected() { # metrics... of the rows in $gathered: what their runs measured, as a file and a table
    # shellcheck disable=SC2086  # rows are words
    find_folders $gathered
    tool evaluations/evidence/collect.py "${folders[@]}" --out "$out/table.json" --metrics "$@"
}

find_folders() { # rows...: sets folders to those of their runs
    folders=()
    for row in "$@"; do
        for seed in "${numbers[@]}"; do folders+=("$out/$row-s$seed"); done
    done
}

proteins="vanilla provq recluster aminoaseed aminoaseed-provq aminoaseed-recluster" # with ours
if [ "$scale" = paper ]; then
    [ -n "$data" ] || fail "--data is missing: the folder that the commands shall name"
fi
case "$table-$scale" in
    core-paper | rivals-paper) fail "$table is not in the paper; use --scale small or confirm" ;;
    1-paper) rows="vanilla llamagen simvq provq" ;;
    5-paper) rows="simvq simvq-soft vanilla soft warmup adaptive provq" ;;
    6-paper) rows="provq linear exp hard lambda-0 lambda-0.25 lambda-1" ;;
    1-*) bed vanilla llamagen simvq provq provq+recluster ;;
    5-*) bed simvq simvq+soft vanilla soft warmup adaptive provq ;;
    6-*) bed provq provq-linear provq-exp provq-hard provq-lambda0 provq-lambda.25 provq-lambda1 ;;
    core-*) bed vanilla vanilla+x10 vanilla+follow warmup warmup+recluster provq provq+follow provq+x10 \
        provq+recluster provq+recluster+x10 ;;
    rivals-*) bed vanilla llamagen ema ema-restart simvq rotation diveq nsvq fsq lfq gumbel soft-to-hard adaptive provq ;;
esac
case "$table" in
    1 | 5 | 6)
        if [ "$scale" = paper ]; then
            # shellcheck disable=SC2086  # rows are words
            images $rows
            # shellcheck disable=SC2086
            find_folders $rows
            for folder in "${folders[@]}"; do
                launch evaluations/reconstruction.py --vq-ckpt "$folder" --data-path "$data/val"
            done
            tool evaluations/report.py "${folders[@]}" --out "$out/table.html"
        fi
        ;;
    2)
        rows="vanilla provq" # the paper's
        [ "$scale" = paper ] || rows="vanilla-x10 provq-x10 recluster-x10"
        # shellcheck disable=SC2086  # rows are words
        images $rows
        reference="$data/VIRTUAL_imagenet256_labeled.npz" features=() sampling=(--num-samples 50000 --cfg-scale 2)
        training=(--gpt-model GPT-L)
        if [ "$scale" != paper ]; then
            reference=digits training=(--preset digits) sampling=(--num-samples 2000 --cfg-scale 1.5)
            extractor=()
            if [ "$scale" = confirm ]; then
                reference="${data:-data}" training=(--gpt-model GPT-tiny) sampling=(--num-samples 5000 --cfg-scale 1.5)
                extractor=(--data-path "$reference")
            fi
            [ -f "$out/extractor.pt" ] ||
                tool evaluations/train_extractor.py "${extractor[@]}" --out "$out/extractor.pt"
            features=(--features "torchscript:$out/extractor.pt" --image-size 32)
        fi
        for row in $rows; do
            for seed in "${numbers[@]}"; do
                run_folder="$out/$row-s$seed" gpt="$out/gpt-$row-s$seed"
                launch autoregressive/extract_codes.py --vq-ckpt "$run_folder"
                launch autoregressive/train_c2i.py "${training[@]}" --code-path "$run_folder/codes" \
                    --vq-ckpt "$run_folder" --global-seed "$seed" --results-dir "$gpt"
                launch autoregressive/sample_c2i.py --gpt-ckpt "$gpt" "${sampling[@]}" --out "$gpt/samples/table"
                tool evaluations/generation.py "$reference" "$gpt/samples/table/samples.npz" "${features[@]}" \
                    --out "$gpt/evaluation/generation.json"
            done
        done
        gathered="gpt-${rows// / gpt-}"
        collected generation.fid generation.inception_score generation.precision generation.recall
        ;;
    3)
        runs_of_4="$(dirname "$out")/table-4-$scale" tokenizers=() folders=()
        rows="vanilla provq aminoaseed aminoaseed-provq" # the paper's
        tasks=(--all --data "$data")
        if [ "$scale" != paper ]; then
            [ -f "$data/interface.jsonl" ] ||
                fail "--data is '$data'; it must be a folder that scripts/make_docking_tasks.py made"
            rows="$proteins"
            tasks=(--task "$data/interface.jsonl" "$data/bfactor.jsonl" --preset small --learning-rates 0.01 0.001)
        fi
        for row in $rows; do
            for seed in "${numbers[@]}"; do
                [ "$scale" = paper ] || [ -e "$runs_of_4/$row-s$seed" ] ||
                    fail "$runs_of_4/$row-s$seed is missing; first: reproduce.sh 4 --scale $scale --data $data"
                tokenizers+=("$row=$runs_of_4/$row-s$seed") folders+=("$runs_of_4/$row-s$seed")
            done
        done
        tool protein/benchmark/train_task.py "${tasks[@]}" --results-dir "$out" --tokenizer foldseek "${tokenizers[@]}"
        [ "$scale" = paper ] || tool evaluations/evidence/collect.py "${folders[@]}" --probes "$out" \
            --out "$out/table.json" --metrics probe.interface probe.bfactor
        ;;
    4)
        [ "$scale" != confirm ] || [ -n "$data" ] || fail "--data is missing: a folder of structures"
        data_flags=() whole=
        if [ -n "$data" ]; then
            data_flags=(--data-path "$data")
            if [ -d "$data/train" ] && [ -d "$data/val" ]; then
                whole="$data/val" data_flags=(--data-path "$data/train" --val-path "$data/val")
            fi
        fi
        case "$scale" in
            small)
                data_flags+=(--preset ideal)
                [ -z "$data" ] || data_flags+=(--codebook-size 512 --codebook-embed-dim 32 --val-size 80
                    --max-steps 600 --warmup-steps 200 --transition-steps 200)
                ;;
            confirm) data_flags+=(--preset small) ;;
            paper) data_flags+=(--preset paper) ;;
        esac
        rows="vanilla provq aminoaseed aminoaseed-provq" # the paper's
        [ "$scale" = paper ] || rows="$proteins"
        for seed in "${numbers[@]}"; do
            for row in $rows; do
                # shellcheck disable=SC2046,SC2086
                launch protein/train_provq.py "${data_flags[@]}" $(flags_of "$row") --global-seed "$seed" \
                    --results-dir "$out/$row-s$seed"
                [ -z "$whole" ] || tool protein/evaluate.py "$whole" --ckpt "$out/$row-s$seed" \
                    --out "$out/$row-s$seed/evaluation/structures.json"
            done
        done
        gathered="$rows"
        collected usage normalized_perplexity code_distance rmsd lddt
        ;;
esac
