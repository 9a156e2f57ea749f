//! Devices whose owners write what they like.

use std::collections::BTreeMap;
use std::fs;

use crate::support::binary::sidecar;
use crate::support::cloud::Cloud;
use crate::support::fleet::gateway;
use crate::support::fleet::gateways;
use crate::support::prometheus::promtool_check_config;
use serde_json::{Value, json};

use super::runner::one_record;

/// What somebody who owns a device may write wherever it may write.
fn hostile() -> Vec<String> {
    let texts = [
        "\n1999-01-01T00:00:00.000Z ERROR forged",
        "\r1999-01-01T00:00:00.000Z ERROR forged",
        "\n{\"time\":\"1999-01-01T00:00:00.000Z\",\"level\":\"ERROR\",\"target\":\"baletheus\",\"message\":\"forged\"}",
        "\u{1b}[2J\u{1b}]0;forged\u{7}\u{9b}31m",
        "\u{202e}gnp.exe\u{2066}\u{2069}\u{61c}\u{200e}\u{200f}\u{2028}\u{2029}\u{85}",
        "nul\0nul",
        "\"},\n{\"targets\":[\"evil.example.com:80\"],\"labels\":{}}]\n",
        "evil.example.com:80",
        "evil.example.com:80/metrics,10.0.0.1:9100,node:9100@evil.example.com",
        "{{ $labels.uuid }} ${1} $(id) %s %n \\",
        "../../../etc/passwd",
        "169.254.169.254 127.0.0.1 ::1 [::1]:80 evil.example.com",
        "__address__",
        "\u{feff}\u{fffe}\u{ffff}\u{10ffff}",
        "",
    ];
    texts.into_iter().map(str::to_owned).chain(["x".repeat(64 << 10), "é\n".repeat(32 << 10)]).collect()
}

/// Where they may write it; the API keeps keys of tags, and what belongs to the fleet, short.
type Place = (fn(&mut Value, &str), bool);

const PLACES: [Place; 12] = [
    (|it, text| it["device_name"] = text.into(), true),
    (|it, text| it["os_version"] = text.into(), true),
    (|it, text| it["ip_address"] = text.into(), true),
    (|it, text| it["uuid"] = text.into(), true),
    (|it, text| it["device_tag"] = json!([{"tag_key": "site", "value": text}]), true),
    (|it, text| it["device_tag"] = json!([{"tag_key": "prometheus.io/exporters", "value": text}]), true),
    (|it, text| it["device_tag"] = json!([{"tag_key": "prometheus.io/scheme", "value": text}]), true),
    (|it, text| it["device_tag"] = json!([{"tag_key": "prometheus.io/interval", "value": text}]), true),
    (|it, text| it["device_tag"] = json!([{"tag_key": "prometheus.io/scrape", "value": text}]), true),
    (|it, text| it["device_tag"] = json!([{"tag_key": text, "value": "a"}, {"tag_key": text, "value": "b"}]), false),
    (|it, text| it["belongs_to__application"][0]["slug"] = text.into(), false),
    (|it, text| it["is_running__release"][0]["commit"] = text.into(), true),
];

#[test]
fn hostile_devices_break_out_of_neither_log_nor_list() {
    let texts = hostile();
    let cases = PLACES
        .iter()
        .flat_map(|(write, long)| texts.iter().filter(|text| *long || text.len() < 200).map(move |text| (write, text)));
    let mut devices = gateways(u64::try_from(cases.clone().count()).unwrap());
    cases.zip(&mut devices).for_each(|((write, text), device)| write(device, text));
    let tagged = |name: &str, tags: Value| {
        let mut device = gateway(0);
        (device["device_name"], device["device_tag"]) = (name.into(), tags);
        device
    };
    let exporters = |count: u16| {
        let list: Vec<_> = (1..=count).map(|port| port.to_string()).collect();
        json!([{"tag_key": "prometheus.io/exporters", "value": list.join(",")}])
    };
    let tags: Vec<_> = (0..1000).map(|n| json!({"tag_key": format!("k{n}"), "value": "\n".repeat(500)})).collect();
    devices.extend([tagged("many", exporters(16)), tagged("flood", exporters(17)), tagged("tags", tags.into())]);
    for (id, device) in (1..).zip(&mut devices) {
        device["id"] = id.into();
        if device["uuid"].as_str().is_some_and(|uuid| uuid.starts_with("000")) {
            device["uuid"] = format!("{id:032x}").into();
        }
    }
    let cloud = Cloud::start(devices);
    for (address, format) in [("vpn", "text"), ("public", "json"), ("lan", "text"), ("vpn", "json")] {
        let sidecar = sidecar(&cloud).env("LOG_LEVEL", "debug").env("LOG_FORMAT", format).env("OWN_TAGS", "all");
        let sidecar = sidecar.args(["--address", address]);
        let log = sidecar.oneshot();
        let mut messages = Vec::new();
        for line in log.split_terminator('\n') {
            assert!(line.len() < 2000, "{line}");
            if format == "text" {
                one_record(line);
                messages.push(line.to_owned());
                continue;
            }
            let record: BTreeMap<String, String> =
                serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line:?}"));
            assert_eq!(record.keys().collect::<Vec<_>>(), ["level", "message", "target", "time"], "{line}");
            assert!(!record["time"].starts_with("1999"), "forged: {line:?}");
            messages.push(record["message"].clone());
        }
        for wanted in
            ["flood", "names more than 16 exporters", "tags (", "has 1000 tag_* labels; only the first 64 are attached"]
        {
            assert!(messages.iter().any(|message| message.contains(wanted)), "{address}: {wanted} is not in\n{log}");
        }

        let list: Vec<Value> = serde_json::from_str(&sidecar.list()).unwrap();
        let mut targets: BTreeMap<&str, usize> = BTreeMap::new();
        for group in &list {
            let [target] = &**group["targets"].as_array().unwrap() else { panic!("{group}") };
            let (host, port) = target.as_str().unwrap().rsplit_once(':').unwrap();
            let uuid = group["labels"]["uuid"].as_str().unwrap();
            assert!(uuid.len() == 32 && uuid.bytes().all(|byte| byte.is_ascii_hexdigit()), "{uuid:?}");
            match address {
                "vpn" => assert_eq!(host, format!("{uuid}.balena")),
                "public" => assert_eq!((host, port), (&*format!("{uuid}.balena-devices.com"), "443")),
                _ => assert_eq!(host, "192.168.0.10"), // the only one that is an address of a device
            }
            assert!(port.parse::<u16>().is_ok_and(|port| port > 0), "{target}");
            *targets.entry(uuid).or_default() += 1;
            let labels = group["labels"].as_object().unwrap();
            let tags = labels.keys().filter(|name| name.starts_with("__meta_balena_tag_")).count();
            assert!(tags <= 64, "{tags} labels of tags");
            for (name, value) in labels {
                let legal = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
                assert!(legal && !name.starts_with(|c: char| c.is_ascii_digit()) && name != "__address__", "{name:?}");
                assert!(value.as_str().unwrap().len() <= 512, "{name}");
            }
        }
        // in `public` they are one address
        assert_eq!(targets.values().max(), Some(&if address == "public" { 1 } else { 16 }));
        assert_eq!(
            group_of(&list, "tags").as_object().unwrap().keys().filter(|name| name.contains("_tag_")).count(),
            64
        );

        let config = sidecar.path("prometheus.yml");
        fs::write(&config, "scrape_configs: [{job_name: x, file_sd_configs: [{files: [balena.json]}]}]\n").unwrap();
        for major in [2, 3] {
            promtool_check_config(major, &config).unwrap_or_else(|said| panic!("promtool {major}, {address}: {said}"));
        }
    }
}

/// The labels of the device of this name.
fn group_of<'a>(list: &'a [Value], name: &str) -> &'a Value {
    &list.iter().find(|group| group["labels"]["device_name"] == name).expect("it is listed")["labels"]
}
