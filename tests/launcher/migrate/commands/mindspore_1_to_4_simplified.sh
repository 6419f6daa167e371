# 生成权重默认保存相对路径下
# 默认路径为：
#dst_ckpt_path=../ckpt/llama2_7b/qkv/${word_size}_llama-2-7b
#infer_strategy_file=../strategy/llama2_7b/qkv/${word_size}_llama-2-7b
# word_size 转出卡数
# src_ckpt_path 转换原权重
word_size=4
src_ckpt_path=/workspace/ckpt/1_llama-2-7b_qkv

python ckpt_convert_n_to_m.sh \
-w $word_size \
-sc $src_ckpt_path &
