//! `docs/faults.md` cannot go stale: each of its lines leads to tests that are there.

mod support;

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use support::doc;

#[test]
fn each_line_of_the_document_leads_to_tests_that_are_there() {
    let rows = doc::rows();
    assert!(rows.len() > 50, "only {} lines are read", rows.len());
    let mut faults = HashSet::new();
    for row in &rows {
        assert!(faults.insert(&row.fault), "{:?} is there twice", row.fault);
        assert!(!row.fault.is_empty() && !row.does.is_empty(), "a cell is empty: {:?}", row.fault);
        for shown in &row.tests {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(&shown.file);
            let source = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            let (before, _) = source
                .split_once(&format!("fn {}(", shown.test))
                .unwrap_or_else(|| panic!("{}: {} has no fn {}", row.fault, shown.file, shown.test));
            // between the attribute and the function stand no more than other attributes
            let between = before.rsplit_once("#[test]").map(|(_, between)| between);
            let is_test = between.is_some_and(|between| {
                between.lines().all(|line| {
                    let line = line.trim();
                    line.is_empty() || line.starts_with("#[")
                })
            });
            assert!(is_test, "{}: {} in {} is no test", row.fault, shown.test, shown.file);
            if let Some(name) = &shown.row {
                let is_there = source.contains(&format!("{name:?}"));
                assert!(is_there, "{}: {} has no row {name:?}", row.fault, shown.file);
            }
        }
    }
}
