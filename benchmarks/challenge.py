"""The network in the package on the 193 validation images of the ISIC 2018 challenge, which nothing was chosen on: one look for a network, a second one is refused. Adds to benchmarks/results/challenge.json.

    HAM10000_DIR=... python benchmarks/challenge.py
"""
import argparse, json, os
from datetime import date
from pathlib import Path


def main(args):
    from skin_lesions.classes import HAM10000
    from skin_lesions.readers import read_metadata
    from skin_lesions.decide import expected_calibration_error
    from skin_lesions.evaluate import scores
    from skin_lesions.bootstrap import average_recall_interval, fraction_right
    from skin_lesions.bundle import BUNDLE_NAMES, named_bundle, read_bundle
    from skin_lesions.predict import load_predictor
    from skin_lesions.split import challenge_validation
    both = challenge_validation(read_metadata(os.environ['HAM10000_DIR']), read_metadata(args.challenge or os.environ["HAM10000_DIR"], part="validation")) # raises where a lesion is on both sides
    valid = both[both.is_valid].reset_index(drop=True)
    record, out = read_bundle(named_bundle(args.bundle) if args.bundle in BUNDLE_NAMES else args.bundle), Path(args.out)
    looks = json.loads(out.read_text())['looks'] if out.is_file() else []
    before = [look['date'] for look in looks if look['sha256'] == record['sha256']]
    if before: raise SystemExit(f"this network was looked at on {before[0]}: {out}")
    found = {}
    for reading in ('most probable class', 'calibrated, decided by the rule'):
        predictor = load_predictor(args.bundle, 'cpu')
        if reading == 'most probable class': predictor.calibration = predictor.rule = predictor.referral = None
        table = predictor.predict(valid, progress=False)
        assert table.problem.isna().all()
        table = table.drop(columns='problem')
        right, (value, low, high, *_) = fraction_right(table), average_recall_interval(table)
        found[reading] = dict(accuracy=float(right.right.mean()), average_recall=value, low=low, high=high, macro_auc=float(scores(table)['macro_auc']), calibration_error=float(expected_calibration_error(table)),
                              recall={c: float(right.right[right.dx == c].mean()) for c in HAM10000.codes})
        if 'refer' in table: found[reading] |= dict(referred=float(table.refer.astype(bool).mean()), malignant_referred=float(table.refer[table.dx.isin(HAM10000.malignant)].astype(bool).mean()))
        if 'ood' in table: found[reading]['unusual'] = float(table.ood.astype(bool).mean())
        print(reading, found[reading])
    c = (record.get('scores') or {}).get('config', {})
    look = dict(date=date.today().isoformat(), bundle=args.bundle, sha256=record['sha256'], network=f"{c['arch']}, {c['stages']} stages, steps {c['steps']}" if 'steps' in c else args.bundle, images=len(valid), groups=int(valid.group.nunique()), counts={c: int((valid.dx == c).sum()) for c in HAM10000.codes}, readings=found)
    out.write_text(json.dumps(dict(looks=[*looks, look]), indent=1) + '\n')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--bundle', default='ham10000')
    parser.add_argument('--challenge', help='folder of the validation images; without it, HAM10000_DIR')
    parser.add_argument('--out', default=str(Path(__file__).parent.parent/'benchmarks'/'results'/'challenge.json'))
    main(parser.parse_args())
