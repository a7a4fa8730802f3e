# scdiag 0.1.0: train on images/train, write the probabilities of images/test
size=$1 epochs=$2 weights=$3
scdiag-train --model timm:tf_efficientnet_lite0 --model_arg pretrained=false --source_checkpoint "$weights" --dataset imagefolder/images --image_size "$size" \
  --epochs "$epochs" --batch_size 64 --lr 1e-3 --scheduler CosineAnnealingLR --sched_arg T_max="$epochs" --seed 42 --num_workers 2 --checkpoint run
scdiag-infer --model timm:tf_efficientnet_lite0 --model_arg pretrained=false --checkpoint run_best.pt --image_size "$size" --output predictions.json images/test/*/*.jpg
