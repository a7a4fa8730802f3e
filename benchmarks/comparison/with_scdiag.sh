# scdiag 0.1.0: train on images/train
size=$1 epochs=$2 weights=$3 here=$4
scdiag-train --model timm:tf_efficientnet_lite0 --model_arg pretrained=false --source_checkpoint "$weights" \
  --dataset imagefolder/images --image_size "$size" --epochs "$epochs" --batch_size 64 --lr 1e-3 \
  --scheduler CosineAnnealingLR --sched_arg T_max="$epochs" --seed 42 --num_workers 2 --checkpoint run --save_frozen
python "$here/with_scdiag.py" "$size"
