//! The tables of the documents equal those of the code.

use std::borrow::Cow;

use baletheus::balena::query::Query;
use baletheus::balena::selection::Selection;
use baletheus::balena::{Listing, Request};
use baletheus::config::OPTIONS;
use baletheus::discovery::exporter;
use baletheus::discovery::inventory::Inventory;
use baletheus::discovery::labels::{self, Kind, LABELS, Label, LabelSet, SCRAPE_LABELS};
use baletheus::discovery::target::Rules;
use serde_json::{Value, json};

use crate::support::fakes::{self, Bytes, list};
use crate::support::fleet::gateways;

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
fn label_tables(table: &'static [Label]) -> [String; 3] {
    let row = |name: &str, about: &str| format!("| `{name}` | {about} |\n");
    let head = "| label | holds |\n| --- | --- |\n".to_owned();
    let plain = labels::plain(table).fold(head.clone(), |text, label| text + &row(label.name, label.about));
    let meta = table.iter().filter(|label| label.kind == Kind::Meta);
    let meta = meta.map(|label| (label.name, label.about)).chain(SCRAPE_LABELS);
    let info = table.iter().filter_map(|label| label.info).chain([labels::ALERT]);
    let info: Vec<_> = info.map(|name| format!("`{name}`")).collect();
    let all = |text: String, (name, about)| text + &row(name, about);
    [plain, meta.fold(head, all), format!("`balena_device_info` has the labels {}.\n", info.join(", "))]
}

#[test]
fn labels() {
    let [plain, meta, info] = label_tables(LABELS);
    check(METRICS_PAGE, "<!-- plain labels", &plain);
    check(METRICS_PAGE, "<!-- meta labels", &meta);
    assert!(METRICS_PAGE.1.contains(&info), "docs/metrics.md has to have:\n\n{info}");
}

/// Nothing but the table knows a label.
#[test]
fn a_label_is_one_line_of_the_table() {
    let added = Label {
        name: "addresses",
        about: "its addresses",
        kind: Kind::Plain,
        field: Some("ip_address"),
        info: Some("addresses"),
        value: |device| device.ip_address.as_deref().map(Cow::Borrowed),
    };
    let table: &'static [Label] = Vec::leak([LABELS, &[added]].concat());
    let all = LabelSet { table, chosen: labels::plain(table).map(|label| label.name).collect() };
    let rules = Rules { labels: all, exporters: exporter::parse_list("9100").unwrap(), ..fakes::rules() };

    let query = Query::new(rules.fields(), &Selection::default()).path(Request::Page {
        list: Listing::Devices,
        after: 0,
        limit: 10,
    });
    assert!(query.contains(",ip_address"), "{query}");
    let query = Query::new(fakes::rules().fields(), &Selection::default()).path(Request::Page {
        list: Listing::Devices,
        after: 0,
        limit: 10,
    });
    assert!(!query.contains("ip_address"), "{query}");

    let mut record = gateways(1).remove(0);
    record["ip_address"] = "10.0.0.7".into();
    let body = json!({ "d": [record] }).to_string();
    let mut inventory = Inventory::default();
    inventory.refresh(&mut Bytes { body: body.as_bytes(), most: 1000 }, &rules).unwrap();
    let list: Value = serde_json::from_slice(&list(&inventory)).unwrap();
    assert_eq!(list[0]["labels"]["addresses"], "10.0.0.7");
    let entry = inventory.entries().next().expect("the device");
    assert!(entry.common.info.ends_with(",addresses=\"10.0.0.7\""), "{}", entry.common.info);

    let documented = label_tables(table);
    assert_eq!(documented[0], label_tables(LABELS)[0].clone() + "| `addresses` | its addresses |\n");
}
