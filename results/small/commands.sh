# The small-scale comparison on CIFAR-10 (JPEG copies), as it was run; no GPU was at hand. See the README.
# data/ held the images as cifar-10-batches-py; two runs went on side by side, on a machine shared with other work.
export OMP_NUM_THREADS=1
for method in "standard" "augmix" "magnma --n 1"; do
  python train.py --method $method --data data --arch resnet20 --subset 20000 --epochs 10 --amp bf16 --resume
done
python corruptions.py --dataset cifar10 --data data --workers 1
for run in standard augmix magnma-n_1; do
  python evaluate.py runs/cifar10/resnet20/$run/seed0 --data data --limit 2000 --amp bf16
done
python tables.py results/small --table 3 --arch resnet20 --format markdown > results/small/table3.md
python tables.py results/small --claims --arch resnet20 --format markdown > results/small/claims.md
python tables.py results/small --arch resnet20 --figures results/small/figures   # four of them are kept
# before the last three lines, log.csv, timing.csv and results.json of each run were copied to results/small/
