//! The tables of the documents equal those of the code.

use baletheus::config::OPTIONS;
use baletheus::discovery::labels::{self, Kind, LABELS, STEERED};

const README: (&str, &str) = ("README.md", include_str!("../../README.md"));
const METRICS_PAGE: (&str, &str) = ("docs/metrics.md", include_str!("../../docs/metrics.md"));
const LABELS_PAGE: (&str, &str) = ("docs/labels.md", include_str!("../../docs/labels.md"));

/// The table behind a comment is exactly this one.
fn check((name, document): (&str, &str), comment: &str, table: &str) {
    let start = document.find(comment).unwrap_or_else(|| panic!("no {comment}"));
    let found = document[start..].split_once("-->").unwrap().1.trim_start();
    let found = found.split("\n\n").next().unwrap().trim_end();
    assert_eq!(found, table.trim_end(), "\n{name}, behind {comment}, has to be:\n\n{table}");
}

#[test]
fn options() {
    let mut table = String::from("| flag | variable | default | meaning |\n| --- | --- | --- | --- |\n");
    for opt in OPTIONS {
        let code = |text: &str| if text.is_empty() { "–".to_owned() } else { format!("`{text}`") };
        let flag = if opt.flag.is_empty() { String::new() } else { format!("--{}", opt.flag) };
        let variables: Vec<_> = opt.vars.iter().map(|name| code(name)).collect();
        table += &format!("| {} | {} | {} | {} |\n", code(&flag), variables.join(", "), code(opt.default), opt.help);
    }
    check(README, "<!-- options", &table);
}

#[test]
fn labels() {
    let row = |name: &str, about: &str| format!("| `{name}` | {about} |\n");
    let head = "| label | holds |\n| --- | --- |\n".to_owned();
    let plain = labels::plain(LABELS).fold(head.clone(), |table, label| table + &row(label.name, label.about));
    check(LABELS_PAGE, "<!-- plain labels", &plain);
    let meta = LABELS.iter().filter(|label| label.kind == Kind::Meta);
    let meta = meta.map(|label| (label.name, label.about)).chain(STEERED);
    check(LABELS_PAGE, "<!-- meta labels", &meta.fold(head.clone(), |table, (name, about)| table + &row(name, about)));
    let info = LABELS.iter().filter_map(|label| Some((label.info?, label.about))).chain([labels::ALERT]);
    check(METRICS_PAGE, "<!-- info labels", &info.fold(head, |table, (name, about)| table + &row(name, about)));
}
