//! The tables of `docs/troubleshooting.md` have each reason with its hint.

use std::collections::BTreeSet;

use baletheus::check::hints::{left_out, scrape};
use baletheus::discovery::left_out::LeftOutReason;
use baletheus::net::{ScrapeError, ScrapeReason};

/// Rows of the table below this heading, without code marks and links.
fn rows(heading: &str) -> Vec<Vec<String>> {
    let page = include_str!("../../docs/troubleshooting.md");
    let (_, section) = page.split_once(&format!("\n## {heading}\n")).expect("the heading is there");
    let section = section.split("\n## ").next().unwrap_or_default();
    let rows = section.lines().filter(|line| line.starts_with("| `"));
    rows.map(|row| row.trim_matches(['|', ' ']).split(" | ").map(|cell| cell.replace('`', "")).collect()).collect()
}

#[test]
fn docs_have_each_reason_of_a_device_without_targets() {
    let expected = LeftOutReason::ALL.iter().map(|reason| [reason.as_str(), reason.text(), left_out(*reason)]);
    let expected: BTreeSet<_> = expected.map(|row| row.map(str::to_owned).to_vec()).collect();
    assert_eq!(rows("A device is left out").into_iter().collect::<BTreeSet<_>>(), expected);
}

#[test]
fn docs_have_each_hint_for_a_target_that_does_not_answer() {
    let mut expected = BTreeSet::new();
    for reason in ScrapeReason::ALL {
        for status in [None, Some(401), Some(403), Some(404), Some(503)] {
            for message in ["", "invalid peer certificate: UnknownIssuer"] {
                let error = ScrapeError { status, ..ScrapeError::new(*reason, message) };
                expected.insert((reason.to_string(), scrape(&error).to_owned()));
            }
        }
    }
    let rows = rows("A target does not answer").into_iter().flat_map(|row| {
        let hint = row[2].clone();
        row[0].split(", ").map(|reason| (reason.to_owned(), hint.clone())).collect::<Vec<_>>()
    });
    assert_eq!(rows.collect::<BTreeSet<_>>(), expected);
}
