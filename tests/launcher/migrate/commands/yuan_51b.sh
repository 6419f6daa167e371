#!/bin/bash

# Yuan 2.0 51B as its own script trains it: 16 uneven stages

GPUS_PER_NODE=8
MASTER_ADDR=node0
MASTER_PORT=6000
NNODES=24
NODE_RANK=0
WORLD_SIZE=$(($GPUS_PER_NODE*$NNODES))

CHECKPOINT_PATH=<Specify path>
DATA_PATH="1 /data/train.txt_document_context"
TOKENIZER_MODEL_PATH=./tokenizer

DISTRIBUTED_ARGS="
    --nproc_per_node $GPUS_PER_NODE \
    --nnodes $NNODES \
    --node_rank $NODE_RANK \
    --master_addr $MASTER_ADDR \
    --master_port $MASTER_PORT
"

GPT_ARGS="
    --tensor-model-parallel-size 1 \
    --pipeline-model-parallel-size 16 \
    --pipeline-model-parallel-method block \
    --pipeline-model-parallel-blocks 2,2,2,2,2,3,3,3,3,3,3,3,3,3,3,2 \
    --timing-log-level 2 \
    --num-workers 2 \
    --num-layers 42 --hidden-size 8192 --num-attention-heads 64 \
    --use-lf-gate --lf-conv2d-group 1 --lf-conv2d-num-pad 1 \
    --position-embedding-type rope --no-embedding-dropout \
    --use-flash-attn --flash-attn-drop 0.1 --attention-dropout 0 --hidden-dropout 0 \
    --fim-rate 0.5 --fim-spm-rate 0.5 \
    --norm-dtype RMSNorm --disable-bias-linear --swiglu --reset-position-ids \
    --adam-beta1 0.9 --adam-beta2 0.95 \
    --seq-length 4096 --max-position-embeddings 4096 \
    --micro-batch-size 1 --global-batch-size 1152 \
    --lr 0.00009 --train-iters 63578 --lr-decay-iters 63578 --lr-decay-style cosine --min-lr 0.9e-5 \
    --weight-decay 1e-1 --use-distributed-optimizer --lr-warmup-iters 1300 --clip-grad 1.0 \
    --recompute-method block --recompute-granularity full --recompute-num-layers 1 \
    --bf16
"

torchrun $DISTRIBUTED_ARGS pretrain_yuan.py \
    $GPT_ARGS \
    --data-path $DATA_PATH --tokenizer-type YuanTokenizer --tokenizer-model-path $TOKENIZER_MODEL_PATH \
    --data-impl mmap --split 10,0,0 \
    --log-interval 1 --save-interval 10000 --eval-interval 1000000 --eval-iters 10 \
    --distributed-backend nccl \
    --save $CHECKPOINT_PATH \
    --load $CHECKPOINT_PATH
