"""Which MILK10k images show HAM10000's photographs: `find_overlap`, a perceptual hash and thumbnails.

    python benchmarks/overlap.py --milk10k FOLDER --data HAM10000 --cache FOLDER

FOLDER of MILK10k has `images` and `overlap_with_ham10000.csv`, 198 pairs that are known. Every second pair, with 300
images that show no photograph of HAM10000, served to choose the number of inliers and is not reported. Goal, written
before the measurement: 5,000 against 10,000 images within 15 minutes on two idle cores, in flat memory.

With `--whole` that search itself is made, from the files and with two threads, and goes into the same JSON under
`whole`: A is all of MILK10k's images and, up to 5,000, photographs of HAM10000 that were changed (rotated, mirrored,
cropped, with other colours, saved again); B is 10,000 images of HAM10000. A search of a tenth of both goes before, in
a process of its own like the other, for the memory.
"""
import argparse, json, os, platform, random, resource, tempfile, time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from PIL import Image, ImageOps
from scipy.stats import binomtest
from skin_lesions.core import read_image
from skin_lesions.overlap import MIN_INLIERS, FeatureStore, find_overlap, perceptual_hash
from skin_lesions.readers import read_metadata

GOAL_MINUTES, USUAL_BITS = 15, 10


def rate(k, n):
    "A fraction with its Wilson interval"
    if not n: return dict(k=0, n=0)
    ends = binomtest(int(k), int(n)).proportion_ci(method='wilson')
    return dict(k=int(k), n=int(n), fraction=round(k/n, 4), low=round(ends.low, 4), high=round(ends.high, 4))


def some(ids, used, n):
    "A random part of the other images, always the same one"
    others = sorted(set(ids)-set(used))
    return [others[i] for i in np.random.default_rng(0).permutation(len(others))[:n]]


def collections(args):
    "Frames of both collections, the true pairs, those and the images that are reported, and the published pairs"
    ham = read_metadata(args.data, collection='ham10000').set_index('image_id', drop=False)
    milk = {p.stem: str(p) for p in sorted((args.milk10k/'images').glob('*.jpg'))}
    listed = pd.read_csv(args.milk10k/'overlap_with_ham10000.csv')
    near = pd.read_csv(args.data/'near_duplicate_pairs.csv')
    pairs = list(zip(listed.image_id, listed.ham_image_id))
    rng = random.Random(1)
    rng.sample(sorted(set(ham.index)-set(listed.ham_image_id)), 2500)
    looked_at = set(rng.sample(sorted(set(milk)-set(listed.image_id)), 300))
    others = some(milk, listed.image_id, args.n_a-len(pairs))
    first = list(dict.fromkeys([*listed.ham_image_id, *near.image_id_a, *near.image_id_b]))
    b = ham.loc[first+some(ham.index, listed.ham_image_id.tolist()+first, args.n_b-len(first))].reset_index(drop=True)
    ids = [*listed.image_id, *others]
    a = pd.DataFrame(dict(image_id=ids, path=[milk[i] for i in ids]), dtype=object)
    return a, b, pairs, looked_at, list(zip(near.image_id_a, near.image_id_b))


def judged(found, truth, group, chosen, others):
    "Recall over known pairs, and pairs that nobody knows of, among the images that count"
    hit = {a for a, b in found if truth.get(a) == b}
    lesion = [(a, b) for a, b in found if a in chosen and b != truth[a] and group[b] == group[truth[a]]]
    wrong = [(a, b) for a, b in found if a in chosen and group[b] != group[truth[a]]]
    unlisted = [(a, b) for a, b in found if a in others]
    return dict(recall=rate(len(hit & chosen), len(chosen)), other_images_of_the_lesion=len(lesion),
                pairs_with_another_lesion=len(wrong), unlisted_pairs=len(unlisted),
                images_with_an_unlisted_pair=rate(len({a for a, _ in unlisted}), len(others)),
                names=[*wrong, *unlisted][:50])


def thumbnail(path):
    "16x16, without mean, of length 1"
    pixels = np.asarray(read_image(path, 64).convert('L'), dtype=np.float32)
    small = cv2.resize(pixels, (16, 16), interpolation=cv2.INTER_AREA)
    small -= small.mean()
    return small/max(np.linalg.norm(small), 1e-6)


def thumbnail_rank(a, b, truth):
    "How many images of B are more like an image of A than the true one, in the best of eight orientations"
    of_b = np.stack([thumbnail(p) for p in b.path]).reshape(len(b), -1)
    likeness = np.full((len(a), len(b)), -1, np.float32)
    for i, path in enumerate(a.path):
        small = thumbnail(path)
        for turned in (small, small[:, ::-1]):
            for k in range(4): likeness[i] = np.maximum(likeness[i], of_b@np.rot90(turned, k).ravel())
    at = [list(b.image_id).index(truth[name]) for name in a.image_id]
    return (likeness > likeness[np.arange(len(a)), at][:, None]).sum(1)


def hash_pairs(a, b):
    "Bits that differ between all images of A and B"
    of_a, of_b = (np.stack([perceptual_hash(p) for p in x.path]) for x in (a, b))
    return np.stack([(row != of_b).sum(1) for row in of_a])


def measure(args):
    a, b, pairs, looked_at, near = collections(args)
    truth, group = dict(pairs), dict(zip(b.image_id, b.group))
    tuned = {x for x, _ in pairs[::2]}
    chosen, others = set(truth)-tuned, set(a.image_id)-set(truth)-looked_at
    store, start = FeatureStore(tempfile.mkdtemp()), time.process_time()
    for path in b.path[-100:]: store.features(path)
    per_image = (time.process_time()-start)/100
    store = FeatureStore(args.cache)
    for path in [*a.path, *b.path]: store.features(path)
    start = time.process_time()
    table = find_overlap(a, b, cache=args.cache, n_workers=1, show=False)
    compared, memory = time.process_time()-start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
    same = table[table.same]
    found = list(zip(same.image_a, same.image_b))
    result = dict(date=str(date.today()), machine=f'{platform.machine()}, one process beside other work',
                  n_a=len(a), n_b=len(b), min_inliers=MIN_INLIERS,
                  chosen_on=f'{len(tuned)} pairs and {len(looked_at)} images that are not reported',
                  find_overlap=judged(found, truth, group, chosen, others))
    surest = {x: n for x, y, n in zip(table.image_a, table.image_b, table.inliers) if truth.get(x) == y}
    result['inliers_of_true_pairs'] = [int(v) for v in np.quantile([surest.get(x, 0) for x in chosen], [0, .05, .5, 1])]
    result['below_the_limit'] = np.bincount(table.inliers[~table.same], minlength=MIN_INLIERS).tolist()
    ends = b[b.image_id.isin([x for pair in near for x in pair])]
    within = find_overlap(ends, b, cache=args.cache, n_workers=1, show=False)
    reported = {frozenset(p) for p in zip(within.image_a[within.same], within.image_b[within.same])}
    result['published_near_duplicates'] = rate(sum(frozenset(p) in reported for p in near), len(near))
    # what is done for B counts as if it grew with A, which is too much rather than too little
    minutes = (15_000*per_image+compared*5000/len(a))/60
    result['time'] = dict(images_per_cpu_second=round(1/per_image, 1), compare_cpu_seconds=round(compared, 1),
                          peak_memory_mb=round(memory), goal_minutes_on_two_cores=GOAL_MINUTES,
                          estimated_cpu_minutes_5000_against_10000=round(minutes, 1))
    return result, (a, b, truth, group, tuned, chosen, others, looked_at)


def baselines(a, b, truth, group, tuned, chosen, others, looked_at):
    "The hash at its usual distance and at the one that is right on the tuning half, and thumbnails as candidates"
    differing = hash_pairs(a, b)
    def pairs_at(bits): return [(a.image_id[i], b.image_id[j]) for i, j in zip(*np.nonzero(differing <= bits))]
    def false(bits):
        scores = judged(pairs_at(bits), truth, group, tuned, looked_at & set(a.image_id))
        return scores['pairs_with_another_lesion']+scores['unlisted_pairs']
    strict = max([bits for bits in range(0, 16, 2) if not false(bits)], default=0)
    ranks = thumbnail_rank(a[a.image_id.isin(chosen)].reset_index(drop=True), b, truth)
    hashes = {f'at_most_{bits}_bits': judged(pairs_at(bits), truth, group, chosen, others)
              for bits in sorted({strict, USUAL_BITS})}
    for scores in hashes.values(): scores.pop('names')
    thumbnails = {f'true_pair_in_first_{k}': rate((ranks < k).sum(), len(ranks)) for k in (1, 10, 100)}
    return dict(perceptual_hash=dict(chosen_bits=strict, **hashes), thumbnails_in_eight_orientations=thumbnails)


def changed(image, rng):
    "Another version of a photograph: a quarter turn and some degrees, mirrored or not, a part of it, other colours"
    image = image.rotate(90*rng.integers(4), expand=True)
    image = image.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC)
    if rng.integers(2): image = ImageOps.mirror(image)
    (w, h), part = image.size, rng.uniform(.6, .8)
    left, top = rng.uniform(.08, .92-part, 2)
    image = image.crop(tuple(int(v) for v in (w*left, h*top, w*(left+part), h*(top+part))))
    return Image.fromarray(np.clip(np.asarray(image)*rng.uniform(.85, 1.15, 3), 0, 255).astype(np.uint8))


def changed_images(b, n, folder):
    "Changed versions of random images of B, and which they are"
    rng, rows = np.random.default_rng(0), []
    for i in sorted(rng.permutation(len(b))[:n]):
        file = folder/f'changed_{i:05}.jpg'
        changed(read_image(b.path[i], 10_000), rng).save(file, quality=85)
        rows.append(dict(image_id=file.stem, path=str(file), of=b.image_id[i]))
    return pd.DataFrame(rows, dtype=object)


def timed_search(a, b, threads=2):
    "A search from the files on, with its times and the largest memory of the process"
    wall, cpu = time.perf_counter(), time.process_time()
    table = find_overlap(a, b, n_workers=threads, show=False)
    used = time.process_time()-cpu
    return table, dict(n_a=len(a), n_b=len(b), threads=threads, minutes=round((time.perf_counter()-wall)/60, 1),
                       cpu_minutes=round(used/60, 1),
                       peak_memory_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024))


def alone(function, *args):
    "In a new process"
    with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool: return pool.submit(function, *args).result()


def whole(args):
    "The search of the goal: its time, its memory, and what it found"
    a, b, pairs, looked_at, _ = collections(args)
    milk = {p.stem: str(p) for p in sorted((args.milk10k/'images').glob('*.jpg'))}
    truth, group = dict(pairs), dict(zip(b.image_id, b.group))
    chosen, others = {x for x, _ in pairs[1::2]}, set(milk)-set(truth)-looked_at
    with tempfile.TemporaryDirectory(prefix='overlap-') as folder:
        versions = changed_images(b, args.n_a-len(milk), Path(folder))
        a = pd.concat([pd.DataFrame(dict(image_id=list(milk), path=list(milk.values())), dtype=object), versions])
        a = a[['image_id', 'path']].sample(frac=1, random_state=0).reset_index(drop=True)
        _, tenth = alone(timed_search, a[:len(a)//10], b[:len(b)//10])
        print(tenth, flush=True)
        table, all_of_it = alone(timed_search, a, b)
    found = [(x, y) for x, y, same in zip(table.image_a, table.image_b, table.same) if same]
    of = dict(zip(versions.image_id, versions.of))
    wrong = [(x, y) for x, y in found if x in of and group[y] != group[of[x]]]
    return dict(date=str(date.today()), machine=f'{platform.machine()}, {os.cpu_count()} cores{args.beside}',
                goal_minutes_on_two_cores=GOAL_MINUTES, search=all_of_it, tenth=tenth,
                changed=dict(recall=rate(sum((x, of[x]) in set(found) for x in of), len(of)),
                             pairs_with_another_lesion=len(wrong)),
                milk10k=judged([p for p in found if p[0] not in of], truth, group, chosen, others),
                names_of_changed=wrong[:50])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--milk10k', type=Path, required=True, help='folder with images and overlap_with_ham10000.csv')
    parser.add_argument('--data', type=Path, required=True, help='folder of HAM10000, with near_duplicate_pairs.csv')
    parser.add_argument('--cache', type=Path, help='folder for features; a stopped run goes on; not with --whole')
    parser.add_argument('--n-a', type=int, help='images of MILK10k; 1000, or 5000 of A with --whole')
    parser.add_argument('--n-b', type=int, help='images of HAM10000; 5000, or 10000 with --whole')
    parser.add_argument('--out', type=Path, default=Path(__file__).parent/'results'/'overlap.json')
    parser.add_argument('--whole', action='store_true', help='the search of the goal, 5,000 against 10,000 images')
    parser.add_argument('--beside', default='', help='what else ran, for the result: ", beside a training" say')
    args = parser.parse_args()
    if args.whole:
        args.n_a, args.n_b = args.n_a or 5000, args.n_b or 10_000
        result = json.loads(args.out.read_text()) | dict(whole=whole(args))
    else:
        args.n_a, args.n_b = args.n_a or 1000, args.n_b or 5000
        result, known = measure(args)
        result.update(baselines(*known))
        kept = json.loads(args.out.read_text()) if args.out.is_file() else {}
        result.update({k: v for k, v in kept.items() if k == 'whole'})
    args.out.write_text(json.dumps(result, indent=1)+'\n')
    print(json.dumps(result, indent=1))


if __name__ == '__main__':
    cv2.setNumThreads(1)
    main()
