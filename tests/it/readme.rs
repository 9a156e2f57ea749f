//! The tables of the documents equal those of the code.

use baletheus::config::OPTIONS;
use baletheus::discovery::labels::{self, LABELS, SCRAPE_LABELS};

const OPTIONS_PAGE: (&str, &str) = ("docs/options.md", include_str!("../../docs/options.md"));
const METRICS_PAGE: (&str, &str) = ("docs/metrics.md", include_str!("../../docs/metrics.md"));

/// The table behind a comment is exactly this one.
fn check((name, document): (&str, &str), comment: &str, table: &str) {
    let start = document.find(comment).unwrap_or_else(|| panic!("no {comment}"));
    let found = document[start..].split_once("-->").unwrap().1.trim_start();
    let found = found.split("\n\n").next().unwrap().trim_end();
    assert_eq!(found, table.trim_end(), "\n{name}, behind {comment}, has to be:\n\n{table}");
}

#[test]
fn options() {
    let mut table = String::from("| flag | variable | default | meaning | takes |\n| --- | --- | --- | --- | --- |\n");
    for opt in OPTIONS {
        let code = |text: &str| if text.is_empty() { "–".to_owned() } else { format!("`{text}`") };
        let flag = if opt.flag.is_empty() { String::new() } else { format!("--{}", opt.flag) };
        let variables: Vec<_> = opt.vars.iter().map(|name| code(name)).collect();
        let more = if opt.more.is_empty() { String::new() } else { format!(". {}", opt.more.trim_end_matches('.')) };
        let (flag, variables, default) = (code(&flag), variables.join(", "), code(opt.default));
        table += &format!("| {flag} | {variables} | {default} | {}{more} | {} |\n", opt.short, opt.takes);
    }
    check(OPTIONS_PAGE, "<!-- options", &table);
}

/// The tables of plain labels and of labels for relabelling, and the sentence with those of `balena_device_info`.
#[test]
fn labels() {
    let row = |name: &str, about: &str| format!("| `{name}` | {about} |\n");
    let head = "| label | holds |\n| --- | --- |\n".to_owned();
    let plain = labels::plain().fold(head.clone(), |text, label| text + &row(label.name, label.about));
    let meta = LABELS.iter().filter(|label| !label.is_plain());
    let scrape = SCRAPE_LABELS.map(|label| (label.name, label.about));
    let meta = meta.map(|label| (label.name, label.about)).chain(scrape);
    check(METRICS_PAGE, "<!-- plain labels", &plain);
    check(METRICS_PAGE, "<!-- meta labels", &meta.fold(head, |text, (name, about)| text + &row(name, about)));
    let info = LABELS.iter().filter_map(|label| label.info).chain([labels::ALERT]);
    let info: Vec<_> = info.map(|name| format!("`{name}`")).collect();
    let info = format!("`balena_device_info` has the labels {}.\n", info.join(", "));
    assert!(METRICS_PAGE.1.contains(&info), "docs/metrics.md has to have:\n\n{info}");
}
