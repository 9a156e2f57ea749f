//! Whatever devices the API lists, the list is one that Prometheus takes, and the same devices give the same list.
//!
//! What Prometheus takes is written down a second time in `support/rules.rs`, and `promtool` has the last word.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::support::fakes::{self, Row, Rows};
use crate::support::prometheus::promtool_check_config;
use crate::support::recording::{self, Recording};
use crate::support::{page, rules};
use baletheus::discovery::exporter;
use baletheus::discovery::inventory::Inventory;
use baletheus::discovery::labels;
use baletheus::discovery::lan::{self, Lan};
use baletheus::discovery::tags::OwnTags;
use baletheus::discovery::target::{Address, Rules};
use baletheus::discovery::target_file::TargetFile;
use baletheus::discovery::{Published, Sink};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use serde_json::{Map, Value, json};

fn inventory(rows: &[Row], rules: &Rules, most: usize) -> Inventory {
    let mut inventory = Inventory::default();
    inventory.refresh(&mut Rows::new(rows, most), rules).unwrap_or_else(|failure| panic!("{}", failure.message));
    inventory
}

/// The file, from one page.
fn list(rows: &[Row], rules: &Rules) -> String {
    let inventory = inventory(rows, rules, usize::MAX);
    String::from_utf8(fakes::list(&inventory)).expect("UTF-8")
}

/// Any text that is JSON: proptest's characters like to be odd ones.
fn text() -> impl Strategy<Value = String> {
    const ODD: [&str; 8] = [
        "\0",
        "\u{1b}[2J\r\n",
        "\"}},{\"targets\":[\"evil.com:80\"]",
        "\\",
        "\u{202e}\u{feff}",
        "{{ . }}",
        "device",
        "__address__",
    ];
    prop_oneof![
        6 => vec(any::<char>(), 0..10).prop_map(String::from_iter),
        2 => select(&ODD[..]).prop_map(str::to_owned),
        1 => (1000..1100_usize).prop_map(|length| "x".repeat(length)),
    ]
}

fn exporters() -> impl Strategy<Value = String> {
    let one = "([a-z]{0,2}:)?[0-9]{1,3}(/[a-z/.@:;]{0,6})?";
    let odd = "[a-z.:/@?#% ]{0,8}:?[0-9]{0,6}(/[a-z/.@:%?# \u{e9}\n]{0,8})?";
    prop_oneof![
        4 => vec(one, 1..18).prop_map(|list| list.join(",")),
        2 => vec(odd, 0..4).prop_map(|list| list.join(",")),
        1 => (1000..1100_usize).prop_map(|length| format!("80/{}", "p".repeat(length))),
        1 => text(),
    ]
}

fn interval() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => "[0-9]{1,2}(s|m|h)",
        2 => "([0-9]{0,3}[ywdhmsµ ]{1,2}){0,4}",
        1 => "[0-9]{1,20}(ms|s|m|h|d|w|y)",
        1 => (1000..1100_usize).prop_map(|length| format!("{}9s", "0".repeat(length))),
        1 => text(),
    ]
}

/// Tags with keys that differ, as the API keeps them.
fn tags() -> impl Strategy<Value = Value> {
    let steering = |key: &'static str, values| (Just(key.to_owned()), values);
    let values = |values: &'static [&str]| select(values).prop_map(str::to_owned).boxed();
    let tag = prop_oneof![
        6 => (text(), text().boxed()),
        2 => ("[a-c._-]{1,2}", text().boxed()),
        2 => steering("prometheus.io/scrape", values(&["true", "yes", "1", "false", "maybe", ""])),
        4 => steering("prometheus.io/exporters", exporters().boxed()),
        2 => steering("prometheus.io/scheme", values(&["http", "https", "ftp", "https://evil.com"])),
        4 => steering("prometheus.io/interval", interval().boxed()),
    ];
    vec(tag, 0..8).prop_map(|tags| {
        let tags: BTreeMap<_, _> = tags.into_iter().collect();
        tags.into_iter().map(|(key, value)| json!({ "tag_key": key, "value": value })).collect()
    })
}

/// Null or missing at times, and now and then of another type.
fn field(valid: impl Strategy<Value = Value> + 'static) -> BoxedStrategy<Option<Value>> {
    prop_oneof![
        80 => valid.prop_map(Some),
        6 => Just(Some(Value::Null)),
        6 => Just(None),
        1 => wrong().prop_map(Some),
    ]
    .boxed()
}

fn wrong() -> impl Strategy<Value = Value> {
    select(vec![
        json!(true),
        json!(7),
        json!(-1.5),
        json!(""),
        json!("x"),
        json!([]),
        json!([null]),
        json!([[]]),
        json!(["x"]),
        json!([{}]),
        json!({}),
        json!({ "__id": 1 }),
        json!([{ "__id": 1 }]),
        json!([{ "tag_key": null }]),
        json!([{ "slug": [] }]),
    ])
}

fn object(fields: Vec<(&str, Option<Value>)>) -> Value {
    let fields = fields.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?)));
    Value::Object(fields.collect::<Map<_, _>>())
}

fn string(texts: impl Strategy<Value = String>) -> impl Strategy<Value = Value> {
    texts.prop_map(Value::String)
}

/// None or one.
fn expanded(row: impl Strategy<Value = Value>) -> impl Strategy<Value = Value> {
    prop_oneof![1 => Just(json!([])), 9 => row.prop_map(|row| json!([row]))]
}

fn device() -> impl Strategy<Value = Value> {
    let uuid = prop_oneof![20 => "[0-9a-f]{32}", 10 => "[0-9a-f]{62}", 1 => "[0-9a-fA-Fg.:]{32}", 1 => text()];
    let odd = ["127.0.0.1", "169.254.1.1", "fe80::1%eth0", "::ffff:127.0.0.1", "evil.com", "[::1]:80", "fd00::1"];
    let address = prop_oneof![
        4 => any::<IpAddr>().prop_map(|address| address.to_string()),
        2 => select(odd.map(str::to_owned).to_vec()),
        1 => text(),
    ];
    let addresses = vec(address, 0..5);
    let device_type = field(string(text())).prop_map(|slug| object(vec![("slug", slug)]));
    let organization = expanded(field(string(text())).prop_map(|handle| object(vec![("handle", handle)])));
    let fleet = (
        field(any::<u32>().prop_map(Value::from)),
        field(string(text())),
        field(string(text())),
        field(organization),
        field(tags()),
    );
    let fleet = fleet.prop_map(|(id, name, slug, organization, tags)| {
        let tags = ("application_tag", tags);
        object(vec![("id", id), ("app_name", name), ("slug", slug), ("organization", organization), tags])
    });
    let release = (field(string(text())), field(string(text())));
    let release = release.prop_map(|(commit, version)| object(vec![("commit", commit), ("raw_version", version)]));
    let fields = (
        field(string(uuid)),
        [(); 4].map(|()| field(string(text()))),
        field(string(addresses.prop_map(|list| list.join(" ")))),
        [(); 2].map(|()| field(prop::bool::weighted(0.8).prop_map(Value::Bool))),
        field(expanded(device_type)),
        field(expanded(fleet)),
        field(expanded(release)),
        field(tags()),
    );
    fields.prop_map(|(uuid, texts, addresses, [online, accessible], device_type, fleet, release, tags)| {
        let names = ["device_name", "os_version", "os_variant", "supervisor_version"];
        let mut fields: Vec<_> = names.into_iter().zip(texts).collect();
        fields.extend([
            ("uuid", uuid),
            ("ip_address", addresses),
            ("is_connected_to_vpn", online),
            ("is_web_accessible", accessible),
            ("is_of__device_type", device_type),
            ("belongs_to__application", fleet),
            ("is_running__release", release),
            ("device_tag", tags),
        ]);
        object(fields)
    })
}

/// Devices with ids, which rise.
fn rows(count: std::ops::Range<usize>) -> impl Strategy<Value = Vec<Row>> {
    vec(device(), count).prop_map(|devices| {
        let number = |(id, mut device): (u64, Value)| {
            device["id"] = id.into();
            (id, device)
        };
        (7..).step_by(7).zip(devices).map(number).collect()
    })
}

/// Among them some that cannot be read, or not even be told apart.
fn wild_rows() -> impl Strategy<Value = Vec<Row>> {
    let ids = vec![Value::Null, json!("7"), json!(-7), json!(7.5), json!([]), json!({ "__id": 7 })];
    let broken = prop_oneof![
        16 => Just(None),
        2 => select(ids).prop_map(|id| Some(json!({ "id": id }))),
        1 => wrong().prop_filter("an array may be read as a device", |value| !value.is_array()).prop_map(Some),
    ];
    (rows(0..7), vec(broken, 7)).prop_map(|(mut rows, broken)| {
        for ((_, device), broken) in rows.iter_mut().zip(broken) {
            match broken {
                Some(Value::Object(fields)) if fields.contains_key("id") => device["id"] = fields["id"].clone(),
                Some(other) => *device = other,
                None => {}
            }
        }
        rows
    })
}

fn rules() -> impl Strategy<Value = Rules> {
    let exporters = select(&["80", "node:9100,app:8080/internal/metrics", "a:80,b:80/x,65535"][..]);
    let labels = subsequence(labels::plain().map(|label| label.name).collect::<Vec<_>>(), 0..=labels::plain().count());
    let address = select(&[Address::Vpn, Address::Public, Address::Lan][..]);
    let own_tags = select(&[OwnTags::Narrow, OwnTags::All, OwnTags::Off][..]);
    let strategy = (address, exporters, labels, own_tags, prop::bool::weighted(0.2));
    strategy.prop_map(|(address, exporters, labels, own_tags, online_only)| Rules {
        address,
        own_tags,
        exporters: exporter::parse_list(exporters).expect("exporters"),
        labels,
        online_only,
        lan: anywhere(),
        ..fakes::rules()
    })
}

/// Devices in any network that can have one.
fn anywhere() -> Lan {
    Lan { networks: lan::networks("0.0.0.0/0,::/0").expect("all networks"), ..fakes::lan() }
}

/// The rules of `file_sd_configs`, the project's own, and what only a look at the devices tells. Gives the number of groups.
fn check(text: &str, rows: &[Row], rules: &Rules) -> Result<usize, TestCaseError> {
    let groups = rules::check(text.as_bytes(), rules).map_err(TestCaseError::fail)?;
    let devices: BTreeMap<u64, &Value> = rows.iter().map(|(id, device)| (*id, device)).collect();
    for group in &groups {
        let device = devices[&group.id().map_err(TestCaseError::fail)?];
        prop_assert_eq!(&device["uuid"], group.label("uuid").unwrap_or_default());
        if rules.address == Address::Lan {
            let told = device["ip_address"].as_str().expect("addresses").split_whitespace();
            let mut told = told.filter_map(|text| text.parse::<IpAddr>().ok());
            prop_assert!(told.any(|told| group.host.trim_matches(['[', ']']) == told.to_string()), "{}", group.host);
        }
        prop_assert!(!rules.online_only || device["is_connected_to_vpn"] == true);
    }
    Ok(groups.len())
}

/// The lines of a file that tell of devices, without the one that has this id.
fn lines_without(list: &str, id: u64) -> Vec<&str> {
    // what looks like this within a value would have its quotes escaped
    let id = format!("\"__meta_balena_device_id\":\"{id}\"");
    let lines = list.lines().map(|line| line.trim_end_matches(','));
    lines.filter(|line| line.starts_with('{') && !line.contains(&id)).collect()
}

/// Each list of tags, wherever it stands, in another order.
fn turn_tags(value: &mut Value, by: usize) {
    match value {
        Value::Array(rows) if rows.iter().all(|row| row.get("tag_key").is_some()) => {
            let len = rows.len().max(1);
            rows.rotate_left(by % len);
            if by.is_multiple_of(2) {
                rows.reverse();
            }
        }
        Value::Array(rows) => rows.iter_mut().for_each(|row| turn_tags(row, by)),
        Value::Object(fields) => fields.values_mut().for_each(|field| turn_tags(field, by)),
        _ => {}
    }
}

proptest! {
    #[test]
    fn prometheus_takes_any_list(rows in wild_rows(), rules in rules()) {
        check(&list(&rows, &rules), &rows, &rules)?;
    }

    #[test]
    fn equal_devices_give_equal_bytes(rows in rows(0..7), rules in rules(), most in 1..9_usize, by in 1..9_usize) {
        let whole = list(&rows, &rules);
        let paged = fakes::list(&inventory(&rows, &rules, most));
        prop_assert_eq!(&whole, &String::from_utf8_lossy(&paged), "in pages of {}", most);
        let mut turned = rows;
        turned.iter_mut().for_each(|(_, device)| turn_tags(device, by));
        prop_assert_eq!(whole, list(&turned, &rules), "with tags in another order");
    }

    #[test]
    fn a_device_never_changes_the_lines_of_others(rows in wild_rows(), rules in rules(), which in any::<prop::sample::Index>()) {
        prop_assume!(!rows.is_empty());
        let mut others = rows.clone();
        let (id, _) = others.remove(which.index(rows.len()));
        let (with, without) = (list(&rows, &rules), list(&others, &rules));
        prop_assert_eq!(lines_without(&with, id), lines_without(&without, 0));
    }
}

/// A recorded answer, spoiled here and there: bytes turned, cut out, doubled, or replaced by what may hurt.
fn spoiled() -> impl Strategy<Value = Vec<u8>> {
    const HURTS: [&[u8]; 16] = [
        b"\0",
        b"null",
        b"\"",
        b"\\u0000",
        b"\\ud800",
        b"\xff",
        b"[",
        b"}",
        b",",
        b"-1",
        b"1e999",
        b"18446744073709551616",
        b"{\"__id\":1}",
        b"127.0.0.1 ::1 ff02::1 ",
        b"prometheus.io/exporters",
        b"\n",
    ];
    #[derive(Clone, Debug)]
    enum Blow {
        Turn(u8),
        Cut(usize),
        Double(usize),
        Put(&'static [u8]),
    }
    let mut names = recording::names("");
    names.retain(|name| ["v6-", "v7-", "filter-", "page-"].iter().any(|kind| name.starts_with(kind)));
    let recordings: Vec<_> = names.iter().map(|name| Recording::read(name).answer.body).collect();
    let blow = prop_oneof![
        4 => any::<u8>().prop_map(Blow::Turn),
        2 => (1..200_usize).prop_map(Blow::Cut),
        2 => (1..2000_usize).prop_map(Blow::Double),
        4 => select(&HURTS[..]).prop_map(Blow::Put),
    ];
    (select(recordings), vec((any::<prop::sample::Index>(), blow), 0..6)).prop_map(|(mut body, blows)| {
        for (at, blow) in blows {
            let at = at.index(body.len() + 1).min(body.len().saturating_sub(1));
            match blow {
                Blow::Turn(by) => body.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= by),
                Blow::Cut(length) => drop(body.drain(at..body.len().min(at + length))),
                Blow::Double(length) => {
                    let twice = body[at..body.len().min(at + length)].to_vec();
                    body.splice(at..at, twice);
                }
                Blow::Put(bytes) => drop(body.splice(at..at, bytes.iter().copied())),
            }
        }
        body
    })
}

/// The body of `fuzz/`.
#[test]
fn any_bytes_as_a_page_give_a_list_within_the_rules_or_none() {
    let recorded = |name: &str| {
        let body = Recording::read(name).answer.body;
        page::KINDS.map(|kind| page::check(&body, kind).expect("a page as it was recorded"))
    };
    // The recordings reach the targets, so what comes of them when spoiled is worth a look.
    assert_eq!(recorded("v7-discovery"), [60, 24, 36, 0]);
    let config = ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() };
    let check = |(body, kind): (Vec<u8>, _)| page::check(&body, kind).map(drop).map_err(TestCaseError::fail);
    TestRunner::new(config).run(&(spoiled(), select(&page::KINDS[..])), check).unwrap();
}

#[test]
fn a_key_twice_gives_equal_bytes_in_any_order() {
    let tags = |key: &str| json!([{ "tag_key": key, "value": "20s" }, { "tag_key": key, "value": "10s" }]);
    for key in ["site", "prometheus.io/interval"] {
        let mut device = json!({ "id": 1, "uuid": "a".repeat(32), "device_tag": tags(key) });
        let one = list(&[(1, device.clone())], &fakes::rules());
        turn_tags(&mut device, 1);
        assert_eq!(one, list(&[(1, device)], &fakes::rules()), "{key}");
    }
}

/// Pages that shrink to what an answer can hold, more of them than the other tests have.
#[test]
fn pages_of_any_size_give_equal_bytes() {
    let rows: Vec<Row> = (1..1200).map(|id| (id * 3, json!({ "id": id * 3, "uuid": format!("{id:032x}") }))).collect();
    let whole = list(&rows, &fakes::rules());
    assert_eq!(check(&whole, &rows, &fakes::rules()).unwrap(), 1199);
    for most in [1000, 999, 499, 62, 6, 1] {
        // of 1000 pages at most
        let rows = &rows[..if most == 1 { 500 } else { rows.len() }];
        let paged = fakes::list(&inventory(rows, &fakes::rules(), most));
        assert!(list(rows, &fakes::rules()).into_bytes() == paged, "in pages of at most {most}");
    }
}

#[test]
fn a_page_is_made_smaller_before_it_outgrows_an_answer() {
    let rows: Vec<Row> = (1..400).map(|id| (id, json!({ "id": id, "uuid": format!("{id:032x}") }))).collect();
    let mut inventory = Inventory::default();
    let mut bodies = |most: usize| {
        let mut source = Rows::new(&rows, most);
        inventory.refresh(&mut source, &fakes::rules()).unwrap();
        source.bodies
    };
    let (first, second, third) = (bodies(200), bodies(200), bodies(200));
    assert!(first > 1 && second > 0, "{first} and {second} pages");
    assert_eq!(third, 0, "pages of at most half of an answer stay as they are");
    assert_eq!(bodies(100), 0, "no page is too large when the devices have grown to twice their size");
}

#[test]
fn the_rules_here_are_not_blind() {
    let good = r#"{"targets":["aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa.balena:80"],"labels":{"uuid":"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa","__meta_balena_device_id":"1"MORE}}"#;
    let rows = [(1, json!({ "id": 1, "uuid": "a".repeat(32) }))];
    let judge = |list: String| {
        std::panic::catch_unwind(|| check(&list, &rows, &fakes::rules())).is_ok_and(|result| result.is_ok())
    };
    assert!(judge(format!(
        "[{}]",
        good.replace("MORE", r#","__scrape_interval__":"1m30s","__scrape_timeout__":"10s""#)
    )));
    for more in [
        r#","uuid":"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa""#,
        r#","a-b":"""#,
        r#","device":"x""#,
        r#","x":1"#,
        r#","x":null"#,
        r#","__address__":"x""#,
        r#","__scrape_interval__":"4s""#,
        r#","__scrape_interval__":"1 m""#,
        r#","__scrape_interval__":"7s""#,
        r#","__scrape_interval__":"1m30s""#,
    ] {
        assert!(!judge(format!("[{}]", good.replace("MORE", more))), "{more}");
    }
    let bare = good.replace("MORE", "");
    for bad in [
        bare.replace(":80", ":0"),
        bare.replace(":80", ""),
        bare.replace("a.balena", "a.balena.evil"),
        bare.replace("\"labels\"", "\"x\""),
        format!("{bare},{bare}"),
        bare.replace('}', ""),
    ] {
        assert!(!judge(format!("[{bad}]")), "{bad}");
    }
}

#[test]
fn promtool_takes_the_most_hostile_lists() {
    let dir = tempfile::tempdir().unwrap();
    let mut runner = TestRunner::deterministic();
    let device = device();
    let rows: Vec<Row> = (1..=200)
        .map(|id| {
            let mut device = device.new_tree(&mut runner).unwrap().current();
            device["id"] = id.into();
            (id, device)
        })
        .collect();
    for (name, address) in [("vpn", Address::Vpn), ("public", Address::Public), ("lan", Address::Lan)] {
        let rules = Rules {
            address,
            exporters: exporter::parse_list("node:9100,app:8080/m").unwrap(),
            lan: anywhere(),
            ..fakes::rules()
        };
        let mut file = TargetFile::new(dir.path().join(format!("{name}.json")), 0o644, false);
        assert_eq!(file.publish(&inventory(&rows, &rules, usize::MAX)), Ok(Published::Written));
        let text = std::fs::read_to_string(dir.path().join(format!("{name}.json"))).unwrap();
        let groups = check(&text, &rows, &rules).unwrap();
        assert!(groups > 100, "{name}: {groups} groups are no proof");
    }
    let config = dir.path().join("prometheus.yml");
    let jobs =
        "scrape_configs: [{ job_name: balena, file_sd_configs: [{ files: [vpn.json, public.json, lan.json] }] }]\n";
    std::fs::write(&config, jobs).unwrap();
    for major in [2, 3] {
        promtool_check_config(major, &config).unwrap_or_else(|said| panic!("promtool {major}: {said}"));
    }
    // It has read them: one number among the labels of one group is enough.
    let list = std::fs::read_to_string(dir.path().join("lan.json")).unwrap();
    std::fs::write(dir.path().join("lan.json"), list.replacen("\"labels\":{", "\"labels\":{\"x\":1,", 1)).unwrap();
    for major in [2, 3] {
        promtool_check_config(major, &config).expect_err("a file that Prometheus would not take");
    }
}
