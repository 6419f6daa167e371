# 1卡(qkv)转4卡(qkv)
yaml_path=../model/llama2_7b/qkv/llama2_7b_4p.yaml
src_ckpt_path=/workspace/ckpt/1_llama-2-7b_qkv
dst_ckpt_path=/workspace/ckpt/4_llama-2-7b
infer_strategy_file=/workspace/strategy/4_llama-2-7b
word_size=4

mkdir -p $infer_strategy_file
mkdir -p $dst_ckpt_path

bash ckpt_convert.sh \
-f distributed_weight_transfer \
-p fp16 \
-w $word_size \
-is $infer_strategy_file \
-sc $src_ckpt_path \
-dc $dst_ckpt_path \
-y $yaml_path &
