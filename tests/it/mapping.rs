//! The real binary over fleets made for it; the file that it writes is compared whole with the ones in `tests/golden`.
//!
//! The golden files were not copied from the output. Those of the recorded devices come from a script that knows the
//! rules and not this program; in the others each line was written down from the rules, by what the device's name says.
//! The order of the labels in a line is the program's own choice.

use std::fmt::Write as _;
use std::path::Path;

use crate::support::binary::sidecar;
use crate::support::cloud::{Cloud, Reply, recorded_devices};
use baletheus::balena::device;
use baletheus::discovery::tags::{OwnTags, Tags};
use baletheus::discovery::{device_exporters, exporter};
use serde_json::{Value, json};

/// A device of a hand-made fleet: an id, a uuid that tells it, a name that tells the case, and what is special.
fn device(id: u64, name: &str, more: Value) -> Value {
    let mut device = json!({ "id": id, "uuid": format!("{id:032x}"), "device_name": name });
    let Value::Object(more) = more else { panic!("{name}: {more}") };
    device.as_object_mut().unwrap().extend(more);
    device
}

fn tags(tags: &[(&str, &str)]) -> Value {
    tags.iter().map(|(key, value)| json!({ "tag_key": key, "value": value })).collect()
}

fn tagged(id: u64, name: &str, own: &[(&str, &str)]) -> Value {
    device(id, name, json!({ "device_tag": tags(own) }))
}

/// With tags of its own and of its fleet, which is nothing but these.
fn in_fleet(id: u64, name: &str, own: &[(&str, &str)], fleet: &[(&str, &str)]) -> Value {
    let fleet = json!([{ "slug": "o/f", "application_tag": tags(fleet) }]);
    device(id, name, json!({ "device_tag": tags(own), "belongs_to__application": fleet }))
}

/// A page as no well-behaved API sends it: the simulated cloud would put wrong types right.
fn page(fleet: &[Value]) -> Reply {
    Reply::status(200, &[("Content-Type", "application/json")], json!({ "d": fleet }).to_string().as_bytes())
}

fn serve(fleet: &[Value]) -> Cloud {
    let (cloud, fleet) = (Cloud::start(Vec::new()), fleet.to_vec());
    cloud.intercept(move |seen, _| seen.target.starts_with("/v7/device?").then(|| page(&fleet)));
    cloud
}

/// One run: the file and the log, which holds all lines and not the first 20 only.
fn run(cloud: &Cloud, options: &[(&str, &str)]) -> (String, String) {
    let sidecar = sidecar(cloud).env("LOG_LEVEL", "debug");
    let sidecar = options.iter().fold(sidecar, |sidecar, (name, value)| sidecar.env(name, *value));
    let log = sidecar.oneshot();
    (sidecar.list(), log)
}

#[track_caller]
fn expect_golden(name: &str, list: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{name}.json"));
    let golden = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut different = String::new();
    let (mut wanted, mut given) = (golden.lines(), list.lines());
    loop {
        let (wanted, given) = (wanted.next(), given.next());
        if wanted.is_none() && given.is_none() {
            break;
        }
        if wanted != given && different.len() < 4000 {
            let _ = writeln!(different, "- {}\n+ {}", wanted.unwrap_or("(end)"), given.unwrap_or("(end)"));
        }
    }
    assert!(list == golden, "{name}.json is not what was written:\n{different}");
}

/// Asserts that the log has one line with all these texts.
#[track_caller]
fn expect_line(log: &str, texts: &[&str]) {
    let lines = log.lines().filter(|line| texts.iter().all(|text| line.contains(text))).count();
    assert!(lines == 1, "{lines} lines with {texts:?} in the log:\n{log}");
}

#[test]
fn recorded_devices_over_the_vpn() {
    let (list, log) = run(&Cloud::start(recorded_devices()), &[]);
    expect_golden("recorded-vpn", &list);
    assert!(
        log.contains("updated balena.json: 30 targets on 30 devices (devices: +30 -0 ~0), 0 devices left out"),
        "{log}"
    );
}

#[test]
fn recorded_devices_by_public_url() {
    let options = [("USE_PUBLIC_URLS", "true"), ("EXPORTERS", "80,app:80/internal/metrics")];
    let (list, log) = run(&Cloud::start(recorded_devices()), &options);
    expect_golden("recorded-public", &list);
    assert!(
        log.contains("updated balena.json: 24 targets on 12 devices (devices: +12 -0 ~0), 18 devices left out"),
        "{log}"
    );
}

#[test]
fn recorded_devices_on_the_lan() {
    let options = [("TARGET_ADDRESS", "lan"), ("EXPORTERS", "node:9100,app:8080/internal/metrics")];
    let (list, log) = run(&Cloud::start(recorded_devices()), &options);
    expect_golden("recorded-lan", &list);
    assert!(
        log.contains("updated balena.json: 36 targets on 18 devices (devices: +18 -0 ~0), 12 devices left out"),
        "{log}"
    );
}

/// A device with a value in every field.
fn complete(id: u64) -> Value {
    let more = json!({
        "uuid": "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcd",
        "ip_address": "192.168.7.7",
        "os_version": "balenaOS 6.1.24",
        "os_variant": "prod",
        "supervisor_version": "16.7.6",
        "is_connected_to_vpn": true,
        "is_web_accessible": true,
        "is_of__device_type": [{ "slug": "raspberrypi4-64" }],
        "belongs_to__application": [{
            "id": 7,
            "app_name": "gateways",
            "slug": "acme/gateways",
            "organization": [{ "handle": "acme" }],
            "application_tag": tags(&[("env", "prod")]),
        }],
        "is_running__release": [{ "commit": "196dbe80abd111a95182bbc3588ec7c9", "raw_version": "2.0.0-rc.1" }],
        "device_tag": tags(&[("site", "berlin")]),
    });
    device(id, "complete", more)
}

/// Devices that are listed, whatever they lack.
fn lacking() -> Vec<Value> {
    let nothing = json!({
        "device_name": null, "ip_address": null, "os_version": null, "os_variant": null, "supervisor_version": null,
        "is_connected_to_vpn": null, "is_web_accessible": null, "is_of__device_type": null, "belongs_to__application": null,
        "is_running__release": null, "device_tag": null,
    });
    let empty = json!({
        "os_version": "", "os_variant": "", "supervisor_version": "", "is_of__device_type": [],
        "belongs_to__application": [], "is_running__release": [], "device_tag": [],
    });
    let hollow = json!({
        "is_of__device_type": [{ "slug": null }],
        "belongs_to__application":
            [{ "id": null, "app_name": null, "slug": null, "organization": null, "application_tag": null }],
        "is_running__release": [{ "commit": null, "raw_version": null }],
    });
    let bare = json!({ "is_of__device_type": [{}], "belongs_to__application": [{}], "is_running__release": [{}] });
    let half = json!({
        "belongs_to__application": [{ "id": 8, "slug": "acme/half", "organization": [], "application_tag": [] }],
        "is_running__release": [{ "commit": "126b6e4aaa33135559350ce5a8123e86" }],
    });
    let nobody = json!({ "belongs_to__application": [{ "app_name": "x", "organization": [{ "handle": null }] }] });
    vec![
        json!({ "id": 1, "uuid": format!("{:032x}", 1) }),
        device(2, "", nothing),
        device(3, "", json!({})),
        device(4, "empty expands", empty),
        device(5, "expands of nulls", hollow),
        device(6, "expands of nothing", bare),
        device(7, "half a fleet", half),
        device(8, "an organization without a name", nobody),
        complete(9),
        device(10, "unknown fields", json!({ "latitude": [1, { "x": "y" }], "vpn_address": null })),
    ]
}

#[test]
fn what_is_null_empty_or_missing_is_no_label() {
    let (list, log) = run(&serve(&lacking()), &[]);
    expect_golden("lacking", &list);
    assert!(
        log.contains("updated balena.json: 10 targets on 10 devices (devices: +10 -0 ~0), 0 devices left out"),
        "{log}"
    );
}

#[test]
fn a_tag_without_a_key_or_a_value_is_no_label() {
    let nulls = json!([
        { "tag_key": null, "value": "a" }, { "value": "b" }, {},
        { "tag_key": "null" }, { "tag_key": "missing", "value": null }, { "tag_key": "site", "value": "berlin" },
    ]);
    let fleet = json!([{ "application_tag": nulls.clone() }]);
    let odd = device(1, "odd", json!({ "device_tag": nulls, "belongs_to__application": fleet }));
    let (list, _) = run(&serve(&[odd]), &[]);
    let labels = r#""device_name":"odd","uuid":"00000000000000000000000000000001","__meta_balena_device_id":"1","__meta_balena_tag_site":"berlin","__meta_balena_fleet_tag_site":"berlin""#;
    let target = "00000000000000000000000000000001.balena:80";
    assert_eq!(list, format!("[\n{{\"targets\":[\"{target}\"],\"labels\":{{{labels}}}}}\n]\n"));
}

#[test]
fn labels_are_chosen_and_the_others_are_for_relabelling() {
    let cloud = serve(&[complete(9)]);
    expect_golden("labels-none", &run(&cloud, &[("LABELS", "none")]).0);
    expect_golden("labels-some", &run(&cloud, &[("LABELS", "commit, fleet")]).0);
}

#[test]
fn a_broken_device_costs_itself_alone_and_is_named() {
    let with = |name: &str, field: &str, value: Value| device(0, name, json!({ field: value }));
    let uuid = |name: &str, uuid: &str| with(name, "uuid", uuid.into());
    let mut broken = vec![
        with("an unexpanded type", "is_of__device_type", json!({ "__id": 1 })),
        with("an unexpanded fleet", "belongs_to__application", json!({ "__id": 1 })),
        with("an unexpanded release", "is_running__release", json!({ "__id": 1 })),
        with("unexpanded tags", "device_tag", json!({ "__id": 1 })),
        with("an unexpanded organization", "belongs_to__application", json!([{ "organization": { "__id": 1 } }])),
        with("unexpanded fleet tags", "belongs_to__application", json!([{ "application_tag": { "__id": 1 } }])),
        with("a type of text", "is_of__device_type", json!("raspberrypi3")),
        with("a fleet of nothing", "belongs_to__application", json!([null])),
        with("a fleet id of text", "belongs_to__application", json!([{ "id": "7" }])),
        with("a numeric slug", "belongs_to__application", json!([{ "slug": 7 }])),
        with("a numeric commit", "is_running__release", json!([{ "commit": 7 }])),
        with("a numeric version", "is_running__release", json!([{ "raw_version": 1.2 }])),
        with("a numeric tag key", "device_tag", json!([{ "tag_key": 1, "value": "x" }])),
        with("a numeric tag value", "device_tag", json!([{ "tag_key": "rack", "value": 2 }])),
        with("a boolean OS version", "os_version", json!(true)),
        with("OS variants", "os_variant", json!(["prod"])),
        with("a supervisor object", "supervisor_version", json!({ "raw": "16.7.6" })),
        with("a numeric uuid", "uuid", json!(7)),
        with("no uuid", "uuid", Value::Null),
        uuid("an empty uuid", ""),
        uuid("31 digits", &"a".repeat(31)),
        uuid("33 digits", &"a".repeat(33)),
        uuid("61 digits", &"a".repeat(61)),
        uuid("63 digits", &"a".repeat(63)),
        uuid("64 digits", &"a".repeat(64)),
        uuid("a letter too far", &format!("{}g", "a".repeat(31))),
        uuid("capitals", &"A".repeat(32)), // the API has lower-case ones
        uuid("32 bytes of a host", &format!("{}.evil.com", "a".repeat(23))),
        uuid("a port in it", &format!("{}:80", "a".repeat(29))),
        uuid("wide digits", &"１".repeat(32)),
        uuid("wide digits of 62 bytes", &format!("{}aa", "１".repeat(20))),
        uuid("an end of line", &format!("{}\n", "a".repeat(31))),
        with("a number for a name", "device_name", json!(42)),
    ];
    // Between good ones, and with ids that rise.
    let mut fleet = Vec::new();
    for (id, mut device) in (2..).step_by(2).zip(broken.drain(..)) {
        device["id"] = id.into();
        if device["uuid"].as_str().is_some_and(|uuid| uuid == format!("{:032x}", 0)) {
            device["uuid"] = format!("{id:032x}").into();
        }
        fleet.push(self::device(id - 1, &format!("good {}", id - 1), json!({})));
        fleet.push(device);
    }
    let last = fleet.len() as u64;
    let without_id = |name: &str, id: Value| device(0, name, json!({ "id": id, "uuid": "f".repeat(32) }));
    let mut missing = without_id("a missing id", Value::Null);
    missing.as_object_mut().unwrap().remove("id");
    fleet.extend([
        without_id("an id of text", json!("5")),
        without_id("a null id", Value::Null),
        without_id("a negative id", json!(-5)),
        without_id("half an id", json!(5.5)),
        missing,
        json!("a text for a device"),
        device(last + 1, "twice, the first", json!({})),
        device(last + 1, "twice, the second", json!({})),
        device(i64::MAX as u64, "good to the last", json!({})),
    ]);

    let (list, log) = run(&serve(&fleet), &[]);
    let good = |id: u64, name: &str| {
        let uuid = format!("{id:032x}");
        let labels = format!(r#""device_name":"{name}","uuid":"{uuid}","__meta_balena_device_id":"{id}""#);
        format!(r#"{{"targets":["{uuid}.balena:80"],"labels":{{{labels}}}}}"#)
    };
    let mut lines: Vec<_> = (1..last).step_by(2).map(|id| good(id, &format!("good {id}"))).collect();
    lines.extend([good(last + 1, "twice, the first"), good(i64::MAX as u64, "good to the last")]);
    assert_eq!(list, format!("[\n{}\n]\n", lines.join(",\n")));

    for device in &fleet {
        // one without any name is known by its uuid or id, or not at all
        let name = device["device_name"].as_str().or(device["uuid"].as_str()).unwrap_or("a device without a name");
        if !name.starts_with("good") && name != "twice, the first" {
            let told = log.lines().filter(|line| line.contains(&format!("left out {name} ("))).count();
            let told = told + log.lines().filter(|line| line.contains(&format!("left out {name}:"))).count();
            assert_eq!(told, 1, "{name}:\n{log}");
        }
    }
    expect_line(&log, &["left out 00000000000000000000000000000042: ", "integer `42`"]);
    let counts = format!(
        "{0} targets on {0} devices (devices: +{0} -0 ~0), {1} devices left out",
        lines.len(),
        fleet.len() - lines.len()
    );
    assert!(log.contains(&counts), "{counts}:\n{log}");
}

/// Text that is no Unicode, a number that is too large, and devices without anything to tell them apart.
#[test]
fn a_record_that_cannot_even_be_read_is_named_and_counted() {
    let body = br#"{"d":[
        {"id":1,"uuid":"00000000000000000000000000000001","device_name":"good 1"},
        {"id":2,"uuid":"00000000000000000000000000000002","device_name":"half a character","os_version":"\ud800","device_tag":[{"tag_key":"a\udfff","value":"b"},{"tag_key":"c","value":"d"}]},
        {"id":3,"uuid":"00000000000000000000000000000003","device_name":"a large number","os_version":1e999},
        {"device_name":"same"},{"device_name":"same"},
        {"id":4,"uuid":"00000000000000000000000000000004","device_name":"good 4"}
    ]}"#;
    let cloud = Cloud::start(Vec::new());
    let reply = || Reply::status(200, &[("Content-Type", "application/json")], body);
    cloud.intercept(move |seen, _| seen.target.starts_with("/v7/device?").then(reply));
    let (list, log) = run(&cloud, &[]);
    let groups: Vec<Value> = serde_json::from_str(&list).unwrap();
    let names: Vec<_> = groups.iter().map(|group| &group["labels"]["device_name"]).collect();
    assert_eq!(names, ["good 1", "half a character", "good 4"]);
    let labels = &groups[1]["labels"];
    assert!(labels.get("os_version").is_none() && labels["__meta_balena_tag_c"] == "d", "{labels}");
    expect_line(&log, &["left out a large number (0000000)"]);
    assert!(log.contains("3 targets on 3 devices (devices: +3 -0 ~0), 3 devices left out"), "{log}");
}

#[test]
fn names_in_every_script_are_themselves() {
    let names = [
        "Überwachung – Küche 2",
        "Ελληνικά Кириллица 日本語 한국어 ไทย हिन्दी ქართული አማርኛ தமிழ்",
        "עברית والعربية",
        "👩\u{200d}🚀 🏴\u{200d}☠\u{fe0f} 🇨🇭",
        "\u{202e}gnp.exe\u{2066}",
        r#"say "hi" \ 'back' `"#,
        "tab\tname",
        "{{ $labels.x }} ${HOME} $1 %s %00 {} }",
        "</script><b>&amp;",
        "\0\u{1}\u{8}\u{c}\u{1b}[31m\u{7f}\u{85}\u{9f}",
        "two\nlines\r\nand\u{2028}more",
        "\u{feff}\u{fffe}\u{ffff}\u{10ffff}\u{e000}",
        "e\u{301} is not é",
        " spaces, around them ",
        "null",
        r#"","uuid":"x"}},{"targets":["evil.com:80"],"labels":{"a":""#,
    ];
    let mut fleet: Vec<_> = (1..).zip(names).map(|(id, name)| device(id, name, json!({}))).collect();
    fleet.extend([
        device(17, &"𝄞".repeat(128), json!({})),
        device(18, &"é".repeat(256), json!({})),                 // 512 bytes
        device(19, &format!("{}x", "é".repeat(256)), json!({})), // and a byte
    ]);
    let (list, log) = run(&serve(&fleet), &[]);
    expect_golden("names", &list);
    // Whatever their names hold, each line of the log is one of the program's own.
    assert!(log.lines().all(|line| line.starts_with("20") && !line.contains('\u{1b}')), "{log}");
}

#[test]
fn tags_become_labels() {
    let long = |bytes: usize| "x".repeat(bytes);
    let fleet = [
        tagged(1, "plain", &[("site", "Zürich HB"), ("rack", "2"), ("Rack", "3"), ("_", "4"), ("1st", "5")]),
        tagged(
            2,
            "reduced",
            &[("note-with:punct", "a \"b\"\t{c}"), ("prometheus.io/port", "9100"), ("ключ", "🔑"), ("🚀", "x")],
        ),
        tagged(3, "colliding", &[("a_b", "third"), ("a-b", "first"), ("a.b", "second"), ("a b c", "another")]),
        in_fleet(
            4,
            "own and fleet's",
            &[("site", "own"), ("tag_x", "1")],
            &[("site", "fleet's"), ("x.y", "2"), ("x-y", "3")],
        ),
        tagged(
            5,
            "long",
            &[
                ("a60KB", &long(60_158)),
                ("most", &long(512)),
                ("more", &long(513)),
                ("wide", &"é".repeat(257)),
                ("z", "ok"),
            ],
        ),
        in_fleet(6, "a long one of the fleet", &[], &[("long", &long(513)), ("z", "ok")]),
        tagged(7, "empty", &[("monitor", ""), ("", "no key")]),
        tagged(8, "like labels", &[("device", "x"), ("uuid", "y"), ("__address__", "evil.com:80"), ("job", "z")]),
    ];
    let (list, log) = run(&serve(&fleet), &[ALL]);
    expect_golden("tags", &list);
    expect_line(&log, &["colliding (0000000)", "__meta_balena_tag_a_b", "a.b"]);
    expect_line(&log, &["colliding (0000000)", "__meta_balena_tag_a_b", "a_b\""]);
    expect_line(&log, &["fleet o/f ", "__meta_balena_fleet_tag_x_y", "x.y"]);
    assert!(!log.contains("like labels (0000000) has"), "{log}");
}

/// Here the tags of devices may do all that the tags of fleets may. What they may do by default is in own_tags.rs.
const ALL: (&str, &str) = ("OWN_TAGS", "all");
const SCRAPE: &str = "prometheus.io/scrape";
const EXPORTERS: &str = "prometheus.io/exporters";
const SCHEME: &str = "prometheus.io/scheme";
const INTERVAL: &str = "prometheus.io/interval";

/// What tags ask for, in any address mode.
fn steered() -> Vec<Value> {
    let sixteen: Vec<_> = (1..=16).map(|port| port.to_string()).collect();
    let (sixteen, seventeen) = (sixteen.join(","), format!("{},17", sixteen.join(",")));
    let own = |id, name: &str, key, value: &str| tagged(id, name, &[(key, value)]);
    let both = |id, name: &str, key, value: &str, fleets: &str| in_fleet(id, name, &[(key, value)], &[(key, fleets)]);
    let mut fleet = vec![
        tagged(1, "as the options say", &[]),
        own(2, "off", SCRAPE, "false"),
        own(3, "OFF, by the way", SCRAPE, " Off "),
        own(4, "off by no", SCRAPE, "no"),
        own(5, "off by 0", SCRAPE, "0"),
        own(6, "on", SCRAPE, "true"),
        own(7, "scrape maybe", SCRAPE, "maybe"),
        own(8, "scrape nothing", SCRAPE, ""),
        both(9, "on in a fleet that is off", SCRAPE, "yes", "off"),
        both(10, "off in a fleet that is on", SCRAPE, "off", "on"),
        in_fleet(11, "off with its fleet", &[], &[(SCRAPE, "false")]),
        both(12, "nonsense in a fleet that is off", SCRAPE, "nonsense", "false"),
        both(13, "nonsense twice", SCRAPE, "ja", "doch"),
        own(20, "two exporters", EXPORTERS, " a:1 , b:65535/x "),
        in_fleet(21, "its fleet's exporters", &[], &[(EXPORTERS, "app:7000/m")]),
        both(22, "exporters beat its fleet's", EXPORTERS, "1234", "app:7000/m"),
        both(23, "bad ones do not", EXPORTERS, "0", "app:7000/m"),
        both(24, "bad ones twice", EXPORTERS, "0", "65536"),
        own(25, "one of two is bad", EXPORTERS, "1,x"),
        own(26, "sixteen", EXPORTERS, &sixteen),
        own(27, "seventeen", EXPORTERS, &seventeen),
        own(28, "none", EXPORTERS, ","),
        own(29, "empty ones between", EXPORTERS, ",,1,, ,2,"),
        own(30, "same address", EXPORTERS, "80,80/other,n:80,n:81,n:80/x,80"),
        own(31, "a path of two", EXPORTERS, "n:1/a/b,2/"),
        own(40, "https", SCHEME, "https"),
        own(41, "http", SCHEME, "http"),
        own(42, "gopher", SCHEME, "gopher"),
        own(43, "a URL for a scheme", SCHEME, "https://evil.com"),
        both(44, "http beats its fleet's https", SCHEME, "http", "https"),
        both(45, "gopher does not", SCHEME, "gopher", "https"),
        in_fleet(46, "https with its fleet", &[], &[(SCHEME, "https")]),
        in_fleet(
            50,
            "all at once",
            &[(EXPORTERS, "node:9100,app:8080/m"), (SCHEME, "https"), (INTERVAL, "5s"), ("site", "x")],
            &[(EXPORTERS, "1"), (SCHEME, "http"), (INTERVAL, "1m"), (SCRAPE, "1")],
        ),
        both(51, "a bad interval of its own", INTERVAL, "soon", "30s"),
        both(52, "an interval beats its fleet's", INTERVAL, "45s", "30s"),
        in_fleet(53, "its fleet's short interval", &[], &[(INTERVAL, "7s")]),
        tagged(
            54,
            "near misses",
            &[("prometheus.io/Scrape", "false"), ("prometheus.io_scrape", "false"), ("scrape", "false")],
        ),
    ];
    const INTERVALS: [&str; 32] = [
        // taken, with a time-out
        "5s",
        "9s999ms",
        "5000ms",
        " 5s ",
        "0h5s",
        // taken
        "10s",
        "10000ms",
        "1h30m",
        "1m30s",
        "1y2w3d4h5m6s7ms",
        "292y",
        "60s",
        "1d",
        // not
        "4s",
        "4s999ms",
        "0",
        "0s",
        "",
        "1 m",
        "1.5h",
        "-10s",
        "+10s",
        "10",
        "10S",
        "10sec",
        "1m1h",
        "30s30s",
        "１０s",
        "293y",
        "99999999999999999999s",
        "1e3s",
        "inf",
    ];
    fleet.extend((100..).zip(INTERVALS).map(|(id, value)| own(id, &format!("interval {value:?}"), INTERVAL, value)));
    fleet
}

#[test]
fn tags_steer_over_the_vpn() {
    let (list, log) = run(&serve(&steered()), &[ALL, ("EXPORTERS", "node:9100,8080/internal")]);
    expect_golden("steered-vpn", &list);
    for (key, name, value) in [
        (SCRAPE, "scrape maybe", "maybe"),
        (SCRAPE, "scrape nothing", ""),
        (SCRAPE, "nonsense in a fleet that is off", "nonsense"),
        (SCRAPE, "nonsense twice", "ja"),
        (SCRAPE, "fleet o/f", "doch"),
        (EXPORTERS, "bad ones do not", "0"),
        (EXPORTERS, "bad ones twice", "0"),
        (EXPORTERS, "fleet o/f", "65536"),
        (EXPORTERS, "one of two is bad", "1,x"),
        (EXPORTERS, "seventeen", "1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17"),
        (EXPORTERS, "none", ","),
        (SCHEME, "gopher", "gopher"),
        (SCHEME, "a URL for a scheme", "https://evil.com"),
        (SCHEME, "gopher does not", "gopher"),
        (INTERVAL, "a bad interval of its own", "soon"),
        (INTERVAL, "interval \"4s\"", "4s"),
        (INTERVAL, "interval \"1 m\"", "1 m"),
        (INTERVAL, "interval \"\"", ""),
        (INTERVAL, "interval \"99999999999999999999s\"", "99999999999999999999s"),
    ] {
        let owner = if name.starts_with("fleet") { format!("{name} ") } else { format!(" {name} (0000000) ") };
        expect_line(&log, &[key, &owner, &format!(" {value:?}")]);
    }
    for exporter in ["80/other", "n:80/x", "80"] {
        expect_line(&log, &[EXPORTERS, "same address (0000000)", &format!(" {exporter} ")]);
    }
    // and no other: 5 for scrape, 6 for exporters, 3 schemes, 1 and 19 intervals
    let of_tags =
        log.lines().filter(|line| line.contains("tag prometheus.io/")).filter(|line| !line.contains("left out "));
    assert_eq!(of_tags.filter(|line| line.contains("absent")).count(), 5 + 6 + 3 + 20, "{log}");
    assert_eq!(log.matches("the later one is left out").count(), 3, "{log}");
}

#[test]
fn tags_steer_public_urls() {
    let mut fleet = steered();
    fleet.iter_mut().for_each(|device| device["is_web_accessible"] = true.into());
    fleet.extend([
        device(200, "switched off", json!({ "is_web_accessible": false })),
        device(201, "unknown", json!({ "is_web_accessible": null })),
        device(202, "missing", json!({})),
        device(203, "a text", json!({ "is_web_accessible": "true" })),
    ]);
    let options = [
        ALL,
        ("TARGET_ADDRESS", "public"),
        ("PUBLIC_URL_DOMAIN", "Devices.Example.ORG"),
        ("EXPORTERS", "80,node:80/n"),
    ];
    let (list, log) = run(&serve(&fleet), &options);
    expect_golden("steered-public", &list);
    for exporter in ["80/other", "n:81", "n:80/x", "80"] {
        expect_line(&log, &[EXPORTERS, "same address (0000000)", &format!(" {exporter} ")]);
    }
    let only = "a public device URL leads to port 80 only";
    expect_line(&log, &["two exporters (0000000): a tag names the exporter b:65535/x: ", only, "65535 is not used"]);
    expect_line(&log, &["fleet o/f: a tag names the exporter app:7000/m: ", only, "7000 is not used"]);
}

#[test]
fn tags_cannot_name_another_host() {
    const TAKEN: [&str; 7] = [
        // a name, which is a label and no host
        "evil.com:80",
        "169.254.169.254:80",
        "a:80/../..//evil",
        "80//evil.com/x",
        "80/@evil.com:81/",
        "80/;evil.com",
        "80/http://evil.com",
    ];
    const REFUSED: [&str; 36] = [
        "http://evil",
        "http://evil.com:80/",
        "//evil.com:80",
        "evil.com",
        "evil.com/80",
        "80@evil.com",
        "evil.com@80",
        "x:80@evil.com",
        "user:pass@evil.com:80",
        "80#@evil.com",
        "80?evil.com",
        "80\\evil.com",
        "80 evil.com",
        "80\nx",
        "80\tx",
        "80\0",
        "80\u{200b}",
        "８０",
        "٨٠",
        "8\u{301}0",
        "80/\u{202e}moc.live",
        "80/ü",
        "80/x\nHost: evil.com",
        "80/a b",
        ":80",
        "[::1]:80",
        "::1:80",
        "évil:80",
        "ev il:80",
        "a/b:80",
        "*:80",
        "",
        "-80",
        "+80",
        "0x50",
        "80.0",
    ];
    let mut fleet: Vec<_> = (1..).zip(TAKEN).map(|(id, value)| tagged(id, value, &[(EXPORTERS, value)])).collect();
    let (own, fleets) = (
        |id, value| tagged(id, "refused", &[(EXPORTERS, value)]),
        |id, value| in_fleet(id, "refused", &[], &[(EXPORTERS, value)]),
    );
    for (id, value) in (100..).step_by(2).zip(REFUSED) {
        fleet.extend([own(id, value), fleets(id + 1, value)]);
    }
    let cloud = serve(&fleet);
    let (list, log) = run(&cloud, &[ALL, ("EXPORTERS", "9100")]);
    expect_golden("hosts", &list);
    // each value of a device's own tag, and each of the fleet's
    assert_eq!(log.matches("absent").count(), 2 * REFUSED.len(), "{log}");

    // The same by public URL, where not even the port is the tag's.
    fleet.iter_mut().for_each(|device| device["is_web_accessible"] = true.into());
    let (list, _) = run(&serve(&fleet), &[ALL, ("TARGET_ADDRESS", "public")]);
    let groups: Vec<Value> = serde_json::from_str(&list).unwrap();
    assert_eq!(groups.len(), fleet.len());
    for (group, device) in groups.iter().zip(&fleet) {
        assert_eq!(group["targets"], json!([format!("{}.balena-devices.com:443", device["uuid"].as_str().unwrap())]));
    }
}

#[test]
fn a_lan_address_is_chosen() {
    const ADDRESSES: [&str; 34] = [
        // listed
        "192.168.1.2",
        " \t10.0.0.3  ",
        "10.0.0.5 10.0.0.4",
        "fd12:3456::1",
        "fd12:3456::1 2001:db8::1",
        "fd12:3456::1 10.0.0.5",
        "FD12:3456:0:0::A",
        "127.0.0.1 10.0.0.6",
        "127.9.9.9 ::1 fd12:3456::2",
        "169.254.1.1 fe80::1 10.0.0.7",
        "fe80::1 febf::1 fd12:3456::3",
        "224.0.0.1 239.255.255.250 ff02::1 10.0.0.8",
        "0.0.0.0 :: 10.0.0.9",
        "fe80::1%eth0 fd12:3456::2%eth0 10.0.0.10",
        "garbage 300.1.1.1 10.0.0.1:80 [fd12:3456::1] 10.0.0.0/8 evil.com 10.0.0.11",
        "::ffff:192.168.1.9", // left out
        "::ffff:10.9.9.9 10.0.0.12",
        // left out
        "8.8.8.8",
        "",
        " ",
        "127.0.0.1",
        "::1",
        "169.254.169.254",
        "fe80::dead:beef",
        "224.0.0.1 ff0e::1",
        "0.0.0.0 ::",
        "::ffff:127.0.0.1 ::ffff:169.254.169.254 ::ffff:0.0.0.0 ::ffff:224.0.0.1",
        "fe80::1%eth0",
        "10.0.0.1,10.0.0.2",
        "010.0.0.1 10.1 0x0a000001 167772161",
        "１０.0.0.1",
        "10.0.0.1/24 10.0.0.1:80 http://10.0.0.1",
        "evil.com localhost",
        "[fd12:3456::1]",
    ];
    let mut fleet: Vec<_> =
        (1..).zip(ADDRESSES).map(|(id, text)| device(id, text, json!({ "ip_address": text }))).collect();
    fleet.extend([
        device(100, "null", json!({ "ip_address": null })),
        device(101, "missing", json!({})),
        device(102, "a list", json!({ "ip_address": ["10.0.0.1"] })),
        device(103, "long", json!({ "ip_address": "fe80::1 ".repeat(250) + "10.0.0.13" })),
    ]);
    fleet.push(device(
        104,
        "steered",
        json!({ "ip_address": "fd12:3456::5 ", "device_tag": tags(&[(EXPORTERS, "a:1/x"), (SCHEME, "https")]) }),
    ));
    let (list, log) = run(&serve(&fleet), &[ALL, ("TARGET_ADDRESS", "lan"), ("EXPORTERS", "node:9100")]);
    expect_golden("lan", &list);
    assert!(log.contains("18 targets on 18 devices (devices: +18 -0 ~0), 21 devices left out"), "{log}");
}

/// Keys that are almost those of a tag that is understood.
const NEARLY: [&str; 8] = [
    "prometheus.io/ports",
    "prometheus.io/probe",
    "prometheus.io.Port",
    "Prometheus.io/port",
    "io.prometheus/port",
    "prometheus/port",
    "prometheus-io/port",
    "prometheus.io",
];

#[test]
fn each_bad_tag_is_warned_of_once() {
    let bad = [
        tagged(1, "gw-1", &[(INTERVAL, "4s"), ("prometheus.io/port", "http")]),
        tagged(2, "gw-2", &[(EXPORTERS, "http://evil"), (SCHEME, "gopher")]),
        tagged(3, "gw-3", &[(SCRAPE, "\u{202e}\"no\"\n")]),
        tagged(4, "gw-4", &[("a.b", "1"), ("a-b", "2")]),
        device(5, "gw-5", json!({ "device_tag": { "__id": 5 } })),
        tagged(6, "gw-6", &[("long", &"x".repeat(513)), ("fits", &"x".repeat(512))]),
        tagged(7, "gw-7", &[("prometheus.io.exporters", "80"), ("prometheus.io/port", "2")]),
        tagged(8, "gw-8", &[("prometheus.io/path", "/x"), ("prometheus.io.quiet", "22:00-05:00")]),
        tagged(9, "gw-9", &NEARLY.map(|key| (key, "80"))),
        device(
            10,
            "gw-10",
            json!({ "belongs_to__application": [{ "id": 1, "app_name": "f", "slug": "o/f", "application_tag": tags(&[("prometheus.io/job", "x")]) }] }),
        ),
    ];
    let cloud = Cloud::start(Vec::new());
    let mut fleet = bad.to_vec();
    cloud.intercept(move |seen, _| {
        (seen.target.starts_with("/v7/device?") && seen.target.contains("(id%20gt%200)")).then(|| {
            let id = fleet.len() as u64 + 1;
            fleet.push(device(id, &format!("newcomer {id}"), json!({}))); // another page each time, and a sign that it was read
            page(&fleet)
        })
    });
    let sidecar = sidecar(&cloud);
    let running = sidecar.start();
    // What is said of a refresh is said before the next one begins.
    running.wait_for("added newcomer 13");
    running.signal("TERM");
    let log = running.wait().1.join("\n");
    for texts in [
        [INTERVAL, " gw-1 (0000000) ", r#" "4s": it is shorter than 5s"#],
        ["prometheus.io/port", " gw-1 (0000000) ", r#" "http": "http" has no port"#],
        [EXPORTERS, " gw-2 (0000000) ", r#" "http://evil""#],
        [SCHEME, " gw-2 (0000000) ", r#" "gopher": not one of http, https;"#],
        [SCRAPE, " gw-3 (0000000) ", r#" "\u{202e}\"no\"\n""#],
        ["__meta_balena_tag_a_b", " gw-4 (0000000) ", "a.b"],
        ["tag long ", " gw-6 (0000000) ", "512 bytes"],
        ["prometheus.io/port ", " gw-7 (0000000) ", "no effect beside the list of exporters"],
        ["prometheus.io/path ", " gw-8 (0000000) ", "no effect without prometheus.io/port"],
        ["prometheus.io.quiet ", " gw-8 (0000000) ", "no effect: a device takes prometheus.io/ with alert, exporters,"],
        ["prometheus.io/job ", " fleet o/f ", "no effect: a fleet takes prometheus.io/ with alert, exporters,"],
    ] {
        expect_line(&log, &[&texts[..], &[" WARN "]].concat());
    }
    for key in NEARLY {
        expect_line(
            &log,
            &[&format!(" WARN  tag {key} of gw-9 (0000000) has no effect: a device takes prometheus.io/ with ")],
        );
    }
    assert_eq!(log.matches(" WARN ").count(), 11 + NEARLY.len(), "{log}");
    let left_out: Vec<_> = log.lines().filter(|line| line.contains("left out gw-")).collect();
    assert!(left_out.len() == 1 && left_out[0].contains(" gw-5 (0000000): "), "{log}");
    let groups: Vec<Value> = serde_json::from_str(&sidecar.list()).unwrap();
    assert!(groups.len() >= 9 + 3, "{groups:?}");
}

#[test]
fn the_grammar_of_exporters() {
    let read = |text: &str| {
        exporter::parse_list(text)
            .map(|list| list.into_iter().map(|one| (one.name, one.port, one.path)).collect::<Vec<_>>())
    };
    let one = |name: Option<&str>, port, path: Option<&str>| {
        Ok(vec![(name.map(str::to_owned), port, path.map(str::to_owned))])
    };
    let name = "aZ0_.-".repeat(10) + "abcd"; // 64 characters
    let path = "/".to_owned() + &"p".repeat(1023);
    assert_eq!(read("80"), one(None, 80, None));
    assert_eq!(read(" 1 "), one(None, 1, None));
    assert_eq!(read("65535"), one(None, 65535, None));
    assert_eq!(read("node:9100"), one(Some("node"), 9100, None));
    assert_eq!(read("app:8080/internal/metrics"), one(Some("app"), 8080, Some("/internal/metrics")));
    assert_eq!(read("80/"), one(None, 80, Some("/")));
    assert_eq!(read("80/a:b"), one(None, 80, Some("/a:b")));
    assert_eq!(read(&format!("{name}:80{path}")), one(Some(&name), 80, Some(&path)));
    assert_eq!(read("a:1,b:2,1").map(|list| list.len()), Ok(3));
    for text in [
        "",
        ",",
        "0",
        "65536",
        "99999999999",
        "x",
        "80:",
        ":80",
        "a:",
        "a:b",
        "a:80:81",
        "node:9100 /x",
        "80,x",
        "a b:80",
        "ä:80",
        "80/ä",
        "80/?a",
        "80/#a",
        "80/%41",
        "80/\"",
        "80/{a}",
        "80/a\\b",
    ] {
        assert!(read(text).is_err(), "{text:?}: {:?}", read(text));
    }
    assert!(read(&format!("x{name}:80")).is_err() && read(&format!("80{path}p")).is_err());
    // As it is shown, it can be read again.
    for text in ["80", "node:9100", "app:8080/internal/metrics", "80/"] {
        assert_eq!(exporter::parse_list(text).unwrap()[0].to_string(), text);
    }
}

#[test]
fn the_grammar_of_intervals() {
    let read = |text: &str| {
        let body = json!({ "d": [tagged(1, "x", &[(INTERVAL, text)])] }).to_string();
        let devices = device::parse_page(body.as_bytes()).unwrap();
        let mut warnings = Vec::new();
        let exporters = exporter::parse_list("80").unwrap();
        let mut tags = Tags::new(&devices[0], OwnTags::All, &mut warnings);
        let scraping = device_exporters::of(&mut tags, None, &exporters);
        let interval = &scraping.exporters[0].interval;
        assert_eq!(warnings.len(), usize::from(interval.is_none()), "{text:?}: {warnings:?}");
        interval.as_ref().map(|(_, millis)| *millis)
    };
    let table = [
        ("5s", 5_000),
        ("5000ms", 5_000),
        ("4s1000ms", 5_000),
        ("9s999ms", 9_999),
        ("10s", 10_000),
        ("1m", 60_000),
        ("1h30m", 5_400_000),
        ("1d", 86_400_000),
        ("1w", 604_800_000),
        ("1y", 31_536_000_000),
        ("0y0w0d0h0m5s0ms", 5_000),
        ("1y1w1d1h1m1s1ms", 31_536_000_000 + 604_800_000 + 86_400_000 + 3_600_000 + 60_000 + 1_001),
        // the longest that fits into Go's nanoseconds
        ("9223372036854ms", 9_223_372_036_854),
    ];
    for (text, millis) in table {
        assert_eq!(read(text), Some(millis), "{text:?}");
    }
    let bad = [
        "",
        "s",
        "5",
        "5 s",
        "5s ,",
        "5S",
        "5sm",
        "5s5",
        "5s5s",
        "5s1m",
        "1ms5s",
        "5us",
        "5µs",
        "5ns",
        "0x5s",
        "5_000ms",
        "4999ms",
        "4s999ms",
        "0",
        "9223372036855ms",
        "293y",
        "292y53w",
        "18446744073709551616ms",
        "18446744073709551615y",
        "５s",
        "5s\0",
    ];
    for text in bad {
        assert_eq!(read(text), None, "{text:?}");
    }
}
