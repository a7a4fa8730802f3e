"""Net benefit and numbers per 1,000 lesions at a stated prevalence: HAM10000 out of fold, and MILK10k.

    python benchmarks/benefit.py

HAM10000: predictions of benchmarks/results/experiments of three networks on the folds that they have not seen, with a
cross-fitted calibration. MILK10k: the packaged network's predictions (benchmarks/results/conformal_tables.csv.gz) with
its own calibration, lesions of its diagnoses. The prevalence is stated, not measured, and so are the reader's
rates. The result goes to benchmarks/results/benefit.json, for nbs/63_benefit.ipynb.
"""
import datetime, json

import pandas as pd

from conformal import RECIPE, RESULTS, TABLES, out_of_fold_table
from cross_collection import packaged_classes

PREVALENCE, THRESHOLD, READER = .03, .02, (.9, .7)
THRESHOLDS = (.005, .01, .015, .02, .03, .04, .05, .07, .1, .15, .2)


def milk10k_table():
    "Lesions of MILK10k with a diagnosis of the packaged network, calibrated as its bundle does"
    from skin_lesions.bundle import decision_part, open_files, read_files
    from skin_lesions.classes import with_classes
    from skin_lesions.core import named_bundle
    table, classes = pd.read_csv(TABLES), packaged_classes()
    codes = list(classes)
    table = table[(table.collection == 'milk10k') & table.dx.isin(codes)].reset_index(drop=True)
    table[codes] = table[codes].div(table[codes].sum(axis=1), axis=0)
    table = with_classes(table[['image_id', *codes, 'dx', 'group']], classes)
    record, _ = open_files(*read_files(named_bundle('ham10000')))
    return decision_part(record, 'calibration').calibrate(table)


def measured(table):
    "Decision curve and counts of a table"
    from skin_lesions.benefit import Reader, decision_curve, malignancy_cases, per_thousand
    curve = decision_curve(table, PREVALENCE, THRESHOLDS)
    counts = per_thousand(table, PREVALENCE, THRESHOLD, reader=Reader(*READER)).reset_index()
    return dict(images=len(table), lesions=int(table.group.nunique()), of_table=malignancy_cases(table).prevalence,
                curve=curve.to_dict('records'), counts=counts.to_dict('records'))


def main():
    from skin_lesions.conformal import calibrated_out_of_fold
    from skin_lesions.decide import fit_calibration
    table = out_of_fold_table()
    ready = calibrated_out_of_fold(table, fit_calibration(table, 'vector'))
    tables = {'HAM10000, out of fold': ready, 'MILK10k, packaged network': milk10k_table()}
    about = dict(date=datetime.date.today().isoformat(), recipe=RECIPE, prevalence=PREVALENCE, threshold=THRESHOLD,
                 reader=dict(zip(('sensitivity', 'specificity'), READER)))
    result = about | dict(tables={name: measured(t) for name, t in tables.items()})
    (RESULTS/'benefit.json').write_text(json.dumps(result, indent=1, default=float) + '\n')
    for name, found in result['tables'].items():
        print(name, pd.DataFrame(found['curve']).round(4).to_string(index=False), sep='\n')
        print(pd.DataFrame(found['counts']).round(1).to_string(index=False))


if __name__ == '__main__': main()
