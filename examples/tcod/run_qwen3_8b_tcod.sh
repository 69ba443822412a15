#!/usr/bin/env bash
# TCOD on ALFWorld: student Qwen3-8B, teacher Qwen3-32B, one node of 8 GPUs, inside slime's container.
#
#   VARIANT=f2b bash examples/tcod/run_qwen3_8b_tcod.sh
#   DRY_RUN=1   bash examples/tcod/run_qwen3_8b_tcod.sh     # print the commands, start nothing
#
# Everything below can be set in the environment. Running it again continues from the last checkpoint of RUN_DIR.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
VARIANT=${VARIANT:-f2b}                                # opd, f2b or b2f
SLIME_DIR=${SLIME_DIR:-$(cd "$HERE/../.." && pwd)}     # slime's checkout
MEGATRON_DIR=${MEGATRON_DIR:-/root/Megatron-LM}
MODEL_SCRIPT=${MODEL_SCRIPT:-$SLIME_DIR/scripts/models/qwen3-8B.sh} # sets MODEL_ARGS for Megatron
STUDENT=${STUDENT:-/root/Qwen3-8B}                     # Hugging Face checkpoint
STUDENT_MCORE=${STUDENT_MCORE:-/root/Qwen3-8B_torch_dist} # the same, converted for Megatron
TEACHER_MODEL=${TEACHER_MODEL:-/root/Qwen3-32B}        # Hugging Face checkpoint, tokenised like the student
TEACHER_URL=${TEACHER_URL:-}                           # an SGLang server that is already up, e.g. http://10.0.0.7:13141
TEACHER_PORT=${TEACHER_PORT:-13141}
TEACHER_GPUS=${TEACHER_GPUS:-6,7}                      # GPUs of the teacher started here, its tensor parallel group
ACTOR_GPUS=${ACTOR_GPUS:-2}                            # GPUs of training, from 0 on
ROLLOUT_GPUS=${ROLLOUT_GPUS:-4}                        # GPUs of the student's engines
export ALFWORLD_DATA=${ALFWORLD_DATA:-/root/alfworld}  # holds json_2.1.1/
DATA_DIR=${DATA_DIR:-/root/tcod_alfworld}              # train.jsonl, valid_seen.jsonl, valid_unseen.jsonl
RUN_DIR=${RUN_DIR:-/root/tcod_runs/qwen3-8b-$VARIANT}  # checkpoints, logs and the resolved command
CONFIG=${CONFIG:-$HERE/configs/alfworld_$VARIANT.yaml} # tcod_* settings
NUM_ROLLOUT=${NUM_ROLLOUT:-250}                        # training steps
BATCH=${BATCH:-16}                                     # tasks per step
SAMPLES_PER_TASK=${SAMPLES_PER_TASK:-1}
LR=${LR:-1e-6}
MAX_TURN_LEN=${MAX_TURN_LEN:-512}                      # new tokens per turn
MAX_CONTEXT_LEN=${MAX_CONTEXT_LEN:-16384}              # tokens of a whole episode
EVAL_INTERVAL=${EVAL_INTERVAL:-25}
SAVE_INTERVAL=${SAVE_INTERVAL:-25}
WANDB_PROJECT=${WANDB_PROJECT:-}                       # set it to log to Weights & Biases
DRY_RUN=${DRY_RUN:-0}

die() {
  echo "run_qwen3_8b_tcod.sh: $*" >&2
  exit 1
}

# ------------------------------------------------------------------------------------------------------ preflight
case $VARIANT in opd | f2b | b2f) ;; *) die "VARIANT must be opd, f2b or b2f, not $VARIANT" ;; esac
[[ -f $MODEL_SCRIPT ]] || die "no $MODEL_SCRIPT: set SLIME_DIR to slime's checkout, or MODEL_SCRIPT"
[[ -f $CONFIG ]] || die "no $CONFIG: set CONFIG to a YAML of tcod_* settings"
if [[ $DRY_RUN != 1 ]]; then
  [[ -d $MEGATRON_DIR ]] || die "no $MEGATRON_DIR: set MEGATRON_DIR to Megatron-LM"
  [[ -d $STUDENT ]] || die "no $STUDENT: set STUDENT to the student's Hugging Face checkpoint"
  [[ -d $STUDENT_MCORE ]] || die "no $STUDENT_MCORE: convert STUDENT with slime's tools/convert_hf_to_torch_dist.py"
  [[ -d $ALFWORLD_DATA/json_2.1.1 ]] || die "no $ALFWORLD_DATA/json_2.1.1: run alfworld-download, or set ALFWORLD_DATA"
  for split in train valid_seen valid_unseen; do
    [[ -s $DATA_DIR/$split.jsonl ]] || die "no $DATA_DIR/$split.jsonl: prepare the data first, see README.md"
  done
  [[ -n $TEACHER_URL || -d $TEACHER_MODEL ]] || die "no $TEACHER_MODEL: set TEACHER_MODEL, or TEACHER_URL"
  python3 -c 'import alfworld, textworld' || die "ALFWorld is not installed: pip install alfworld==0.4.2"
fi

# ------------------------------------------------------------------------------------------------------ arguments
MODEL_ARGS=()
# shellcheck disable=SC1090
source "$MODEL_SCRIPT"
START_TEACHER=0
if [[ -z $TEACHER_URL ]]; then
  START_TEACHER=1
  TEACHER_URL=http://127.0.0.1:$TEACHER_PORT
fi
TEACHER_TP=$(awk -F, '{print NF}' <<<"$TEACHER_GPUS")
TEACHER_COMMAND=(
  python3 -m sglang.launch_server --model-path "$TEACHER_MODEL" --host 127.0.0.1 --port "$TEACHER_PORT"
  --tp "$TEACHER_TP" --context-length $((MAX_CONTEXT_LEN + 7)) --chunked-prefill-size 4096 --mem-fraction-static 0.8
)
CKPT_ARGS=(
  --hf-checkpoint "$STUDENT" --ref-load "$STUDENT_MCORE"
  --load "$RUN_DIR/checkpoints" --save "$RUN_DIR/checkpoints" --save-interval "$SAVE_INTERVAL"
)
TCOD_ARGS=(
  --rollout-function-path tcod_rollout.generate_rollout
  --custom-generate-function-path tcod_rollout.generate
  --custom-rm-path tcod_rollout.reward_func
  --custom-reward-post-process-path tcod_rollout.post_process_rewards
  --dynamic-sampling-filter-path tcod_rollout.drop_failed
  --custom-config-path "$CONFIG"
  --rm-url "$TEACHER_URL/generate"
  --use-opd --opd-type sglang --opd-kl-coef 1.0
)
ROLLOUT_ARGS=(
  --prompt-data "$DATA_DIR/train.jsonl" --input-key prompt --label-key label
  --apply-chat-template-kwargs '{"enable_thinking": false}' --rollout-shuffle
  --num-rollout "$NUM_ROLLOUT" --rollout-batch-size "$BATCH" --n-samples-per-prompt "$SAMPLES_PER_TASK"
  --global-batch-size $((BATCH * SAMPLES_PER_TASK)) --balance-data
  --rollout-max-response-len "$MAX_TURN_LEN" --rollout-max-context-len "$MAX_CONTEXT_LEN" --rollout-temperature 1
)
EVAL_ARGS=(
  --eval-interval "$EVAL_INTERVAL" --n-samples-per-eval-prompt 1
  --eval-prompt-data seen "$DATA_DIR/valid_seen.jsonl" unseen "$DATA_DIR/valid_unseen.jsonl"
  --eval-temperature 0.4 --eval-top-p 1 --eval-max-response-len "$MAX_TURN_LEN"
)
TRAIN_ARGS=(
  --advantage-estimator grpo --entropy-coef 0.0
  --optimizer adam --lr "$LR" --lr-decay-style constant --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.98
  --tensor-model-parallel-size "$ACTOR_GPUS" --sequence-parallel
  --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
  --use-dynamic-batch-size --max-tokens-per-gpu "$MAX_CONTEXT_LEN"
  --attention-dropout 0.0 --hidden-dropout 0.0 --attention-softmax-in-fp32 --attention-backend flash
  --accumulate-allreduce-grads-in-fp32
)
CLUSTER_ARGS=(
  --actor-num-nodes 1 --actor-num-gpus-per-node "$ACTOR_GPUS" --rollout-num-gpus "$ROLLOUT_GPUS"
  --rollout-num-gpus-per-engine 1 --sglang-mem-fraction-static 0.8 --router-policy consistent_hashing
)
WANDB_ARGS=()
if [[ -n $WANDB_PROJECT ]]; then
  WANDB_ARGS=(--use-wandb --wandb-project "$WANDB_PROJECT" --wandb-group "$(basename "$RUN_DIR")")
fi
TRAIN_COMMAND=(
  python3 "$SLIME_DIR/train.py" "${MODEL_ARGS[@]}" "${CKPT_ARGS[@]}" "${TCOD_ARGS[@]}" "${ROLLOUT_ARGS[@]}"
  "${EVAL_ARGS[@]}" "${TRAIN_ARGS[@]}" "${CLUSTER_ARGS[@]}" "${WANDB_ARGS[@]}"
)
if [[ $DRY_RUN == 1 ]]; then
  if ((START_TEACHER)); then printf '%q ' "CUDA_VISIBLE_DEVICES=$TEACHER_GPUS" "${TEACHER_COMMAND[@]}" && echo; fi
  printf '%q ' "${TRAIN_COMMAND[@]}" && echo
  exit 0
fi

# ------------------------------------------------------------------------------------------------------------ run
mkdir -p "$RUN_DIR/logs"
printf '%q ' "${TRAIN_COMMAND[@]}" >"$RUN_DIR/logs/command.sh"
TEACHER_PID=
cleanup() {
  trap - EXIT
  # The teacher runs in a session of its own: its process group is exactly what was started here.
  if [[ -n $TEACHER_PID ]]; then kill -- "-$TEACHER_PID" 2>/dev/null || true; fi
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
if ((START_TEACHER)); then
  CUDA_VISIBLE_DEVICES=$TEACHER_GPUS setsid "${TEACHER_COMMAND[@]}" >"$RUN_DIR/logs/teacher.log" 2>&1 &
  TEACHER_PID=$!
  for _ in $(seq 180); do
    if curl -sf --noproxy '*' "$TEACHER_URL/health_generate" >/dev/null; then break; fi
    kill -0 "$TEACHER_PID" 2>/dev/null || { tail -n 30 "$RUN_DIR/logs/teacher.log" && die "the teacher did not start"; }
    sleep 5
  done
fi
curl -sf --noproxy '*' "$TEACHER_URL/health_generate" >/dev/null || die "no teacher answers at $TEACHER_URL"

# slime joins the Ray cluster that RAY_ADDRESS names; else Ray starts here, on the GPUs that are not the teacher's.
if [[ -z ${RAY_ADDRESS:-} ]]; then
  CUDA_VISIBLE_DEVICES=$(seq -s, 0 $((ACTOR_GPUS + ROLLOUT_GPUS - 1)))
  export CUDA_VISIBLE_DEVICES
fi
export PYTHONPATH=$HERE:$MEGATRON_DIR:$SLIME_DIR${PYTHONPATH:+:$PYTHONPATH}
export CUDA_DEVICE_MAX_CONNECTIONS=1 PYTHONUNBUFFERED=1
cd "$SLIME_DIR"
"${TRAIN_COMMAND[@]}" 2>&1 | tee -a "$RUN_DIR/logs/train.log"
