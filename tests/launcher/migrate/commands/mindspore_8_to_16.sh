# 8卡(qkv)转16卡(qkv)
# fp16 fp16-8p 转 fp16-16p
yaml_path=../model/llama2_7b/qkv/llama2_7b_16p.yaml
src_ckpt_path=/workspace/ckpt/8_llama-2-7b/fp16_8p_qkv
dst_ckpt_path=/workspace/ckpt/16_llama-2-7b
infer_strategy_file=/workspace/strategy/16_llama-2-7b
word_size=16

mkdir -p $infer_strategy_file
mkdir -p $dst_ckpt_path

# 两台机器同时执行同一个脚本
bash ckpt_convert_for_16p.sh \
-f distributed_weight_transfer \
-p fp16 \
-w $word_size \
-is $infer_strategy_file \
-sc $src_ckpt_path \
-dc $dst_ckpt_path \
-y $yaml_path
