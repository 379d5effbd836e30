# Why AugMix is ahead of MAGNMA in results/small: n = 1 against the paper's n = 5, on digits, where both are affordable.
export OMP_NUM_THREADS=1
python corruptions.py --dataset digits --data data
for seed in 0 1; do
  for method in "standard" "augmix" "magnma --n 1" "magnma --n 5"; do # Standard with seed 0 alone
    python train.py --dataset digits --data data --arch resnet20 --epochs 8 --batch-size 32 --amp bf16 --seed $seed --method $method
  done
done
for run in runs/digits/resnet20/*/seed*; do python evaluate.py "$run" --data data --only last --amp bf16; done
