//! `docs/dev/faults.md` and `docs/security.md` cannot go stale: each line of their tables leads to tests that are there.

use std::collections::HashSet;
use std::fs;
use std::iter;
use std::path::{Path, PathBuf};

use crate::support::doc;

#[test]
fn each_line_of_the_document_leads_to_tests_that_are_there() {
    let rows = doc::rows();
    assert!(rows.len() > 50, "only {} lines are read", rows.len());
    check(&rows);
}

#[test]
fn each_attack_leads_to_tests_that_are_there() {
    let rows = doc::attacks();
    assert!(rows.len() > 10, "only {} lines are read", rows.len());
    check(&rows);
}

fn check(rows: &[doc::Row]) {
    let mut faults = HashSet::new();
    for row in rows {
        assert!(faults.insert(&row.fault), "{:?} is there twice", row.fault);
        assert!(!row.fault.is_empty() && !row.does.is_empty(), "a cell is empty: {:?}", row.fault);
        for shown in &row.tests {
            let source = source(&shown.file);
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

/// The text of `file`, which is in `tests/it` or in `tests`, and of its modules.
fn source(file: &str) -> String {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let paths = [tests.join("it").join(file), tests.join(file)];
    let path = paths.iter().find(|path| path.is_file());
    let path = path.unwrap_or_else(|| panic!("{file} is neither in tests/it nor in tests"));
    let modules = fs::read_dir(path.with_extension("")).into_iter().flatten();
    let modules = modules.map(|module| module.expect("a module").path());
    let read = |path: PathBuf| fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    iter::once(path.clone()).chain(modules).map(read).collect()
}
