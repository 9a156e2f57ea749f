//! The simulated balenaCloud gives the answers that a real open-balena-api gave when it was recorded.

use crate::support::cloud::{self, Cloud, KEY};
use crate::support::recording::{self, Answer, Recording, Request};
use flate2::read::GzDecoder;
use serde_json::Value;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

const DEVICE_KEY: &str = "simulated-device-key-of-device-1";

/// Recordings that the simulation does not give, and why.
const LEFT_OUT: &[(&str, &str)] = &[
    ("429-login", "a fault, and of a request that was not recorded"),
    ("5xx-database-stopped", "a fault: the request is an ordinary one"),
    ("ok-select-vpn_address-v6", "of version 6, which baletheus does not speak"),
    ("v6-full", "of version 6, which baletheus does not speak"),
    ("v7-no-select", "has fields that no other recording tells of most devices"),
];

/// Recordings that are compared without the order of their lists, and why.
const ANY_ORDER: &[(&str, &str)] = &[
    ("page-top-huge", "asks for no order, so the devices come in any"),
    ("v7-full", "its tags come in another order than those of v7-discovery"),
];

/// Recordings of other moments than those that the fleet of `recorded_services` is made from. `tests/it/installs.rs` reads them.
const SERVICES_LEFT_OUT: &[&str] = &[
    "services/moved-to-another-fleet",
    "services/shared-image-after-update",
    "services/update-1-before",
    "services/update-2-queued",
    "services/update-3-downloading",
    "services/update-4-downloaded",
    "services/update-5-replacing",
    "services/update-6-starting",
    "services/update-7-cleanup",
    "services/update-9-rolled-back",
];

/// Recordings of keys without a right, and what they may not read.
const DENIED: [(&str, &str); 4] = [
    ("key-without-permission", "image_install"),
    ("key-without-service-read", "service"),
    ("key-without-image-read", "image"),
    ("key-without-release-read", "release"),
];

/// The headers that are compared.
const HEADERS: &[&str] = &[
    "Cache-Control",
    "Connection",
    "Content-Length",
    "Content-Type",
    "ETag",
    "Keep-Alive",
    "Location",
    "Retry-After",
    "Transfer-Encoding",
    "Vary",
];

fn start() -> Cloud {
    let cloud = Cloud::start(cloud::recorded_devices());
    cloud.add_device_key(DEVICE_KEY, 1);
    cloud
}

/// Sends a request and closes that direction, so that the answer is all that comes.
fn ask(cloud: &Cloud, request: &Request) -> Answer {
    // The port of the recorder, which one recorded answer repeats.
    let mut head = format!("{} {} HTTP/1.1\r\nHost: 127.0.0.1:18337\r\n", request.method, request.target);
    for (name, value) in &request.headers {
        head += &format!("{name}: {value}\r\n");
    }
    let mut stream = TcpStream::connect(cloud.addr()).expect("the cloud listens");
    stream.write_all((head + "\r\n").as_bytes()).expect("sent");
    stream.shutdown(Shutdown::Write).expect("shut down");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("answered");
    Answer::parse(&answer)
}

fn get(cloud: &Cloud, target: &str, more: &[(&str, &str)]) -> Answer {
    let authorization = ("Authorization".to_owned(), format!("Bearer {KEY}"));
    let more = more.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    let request =
        Request { method: "GET".to_owned(), target: target.to_owned(), headers: more.chain([authorization]).collect() };
    ask(cloud, &request)
}

fn ids(answer: &Answer) -> Vec<u64> {
    assert_eq!(answer.status, "HTTP/1.1 200 OK", "{answer:?}");
    let body: Value = serde_json::from_slice(&answer.body).expect("JSON");
    let devices = body["d"].as_array().expect("a list");
    devices.iter().filter_map(|device| device["id"].as_u64()).collect()
}

fn without_order(value: &Value) -> Value {
    match value {
        Value::Array(items) => {
            let mut items: Vec<_> = items.iter().map(without_order).collect();
            items.sort_by_cached_key(Value::to_string);
            Value::Array(items)
        }
        Value::Object(fields) => {
            let field = |(name, value): (&String, &Value)| (name.clone(), without_order(value));
            Value::Object(fields.iter().map(field).collect())
        }
        _ => value.clone(),
    }
}

/// How an answer differs from the recorded one.
fn compare(given: &Answer, recorded: &Answer, any_order: bool) -> Vec<String> {
    let mut differences = Vec::new();
    let mut expect = |what: &str, given: String, recorded: String| {
        if given != recorded {
            differences.push(format!("{what}: {given}\n  recorded: {recorded}"));
        }
    };
    expect("status", given.status.clone(), recorded.status.clone());
    for name in HEADERS {
        if !(any_order && *name == "ETag") {
            let [given, recorded] = [given, recorded].map(|answer| format!("{:?}", answer.header(name)));
            expect(name, given, recorded);
        }
    }
    let body = |answer: &Answer| match serde_json::from_slice(&answer.body) {
        Ok(body) if any_order => without_order(&body).to_string(),
        _ => String::from_utf8_lossy(&answer.body).into_owned(),
    };
    expect("body", body(given), body(recorded));
    differences
}

#[test]
fn answers_are_the_recorded_ones() {
    let left_out: Vec<_> = LEFT_OUT.iter().map(|(name, _)| *name).collect();
    compare_all(&start(), "", &left_out, ANY_ORDER);
}

/// Those of the services that run on each device, of their updates, and of keys with few permissions.
#[test]
fn answers_about_services_are_the_recorded_ones() {
    let cloud = Cloud::start(cloud::recorded_services());
    cloud.add_device_key(DEVICE_KEY, 2);
    compare_all(&cloud, "services/", SERVICES_LEFT_OUT, &[]);
}

fn compare_all(cloud: &Cloud, folder: &str, left_out: &[&str], any_order: &[(&str, &str)]) {
    let any_order: Vec<_> = any_order.iter().map(|(name, _)| *name).collect();
    let names = recording::names(folder);
    for name in left_out.iter().chain(&any_order) {
        assert!(names.iter().any(|other| other == name), "{name} is listed, but there is no such recording");
    }

    let mut wrong = Vec::new();
    for name in names.iter().filter(|name| !left_out.contains(&name.as_str())) {
        let Recording { request, answer } = Recording::read(name);
        let Some(mut request) = request else {
            wrong.push(format!("{name} is neither compared nor listed"));
            continue;
        };
        // Where the recorder kept back a key, `KEY` can be a good one or the bad one that the recording is about.
        let key = if name.contains("bad-key") { "no-such-key" } else { KEY };
        for (_, value) in &mut request.headers {
            *value = value.replace("<DEVICE_KEY>", DEVICE_KEY).replace("<NAMED_KEY>", KEY);
            *value = value.replace("Bearer KEY", &format!("Bearer {key}"));
        }
        let denied = DENIED.iter().find(|(recording, _)| name.contains(recording));
        cloud.deny(denied.map(|(_, resource)| *resource));
        let differences = compare(&ask(cloud, &request), &answer, any_order.contains(&name.as_str()));
        wrong.extend(differences.iter().map(|difference| format!("{name}: {difference}")));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn an_encoded_query_is_refused() {
    let cloud = start();
    for target in [
        "/v7/device?$select=id%2Cuuid",
        "/v7/device?$select%3Did",
        "/v7/device?$filter=device_tag%2Fany(t:t/tag_key%20eq%20'site')",
        "/v7/device?$filter=device_tag/any%28t:t/tag_key%20eq%20'site'%29",
        "/v7/device?$filter=device_tag/any(t%3At/tag_key%20eq%20'site')",
        "/v7/device?$expand=device_tag($select=tag_key%3B$top=1)",
        "/v7/device?$select=device%5Fname",
    ] {
        let answer = get(&cloud, target, &[]);
        assert_eq!(answer.status, "HTTP/1.1 400 Bad Request", "{target}");
        assert_eq!(answer.body, format!("\"Malformed url: '{target}'\"").as_bytes());
    }
    let literal = "/v7/device?%24select=id&$filter=device_name+eq+%27O%27%27Brien%27%27s%20box%27";
    assert_eq!(ids(&get(&cloud, literal, &[])), [14]);
}

#[test]
fn and_binds_no_more_than_or() {
    let cloud = start();
    let asked = |filter: &str| {
        let filter = filter.replace(' ', "%20");
        let target = format!("/v7/device?$select=id&$orderby=id%20asc&$filter={filter}");
        ids(&get(&cloud, &target, &[]))
    };
    assert_eq!(asked("id eq 1 or id eq 2 and id eq 2"), [2]);
    assert_eq!(asked("id eq 1 or (id eq 2 and id eq 2)"), [1, 2]);
    assert_eq!(asked("id lt 4 and not(id in (1,3))"), [2]);
}

#[test]
fn a_known_answer_is_not_sent_again() {
    let cloud = start();
    let target = "/v7/device?$select=id,is_online&$orderby=id%20asc";
    let first = get(&cloud, target, &[]);
    let etag = first.header("ETag").expect("an ETag");
    let again = get(&cloud, target, &[("If-None-Match", etag)]);
    assert_eq!(again.status, "HTTP/1.1 304 Not Modified");
    assert_eq!(again.header("ETag"), Some(etag));
    assert_eq!(again.body, b"");

    cloud.change(|devices| devices[0]["is_online"] = Value::from(false));
    let changed = get(&cloud, target, &[("If-None-Match", etag)]);
    assert_eq!(changed.status, "HTTP/1.1 200 OK");
}

#[test]
fn gzip_is_the_same_answer() {
    let cloud = start();
    let target = "/v7/device?$select=id,uuid,device_name&$orderby=id%20asc";
    let plain = get(&cloud, target, &[]);
    let packed = get(&cloud, target, &[("Accept-Encoding", "gzip")]);
    assert_eq!(packed.header("Content-Encoding"), Some("gzip"));
    assert_eq!(packed.header("ETag"), plain.header("ETag"));
    let mut unpacked = Vec::new();
    let read = GzDecoder::new(&*packed.body).read_to_end(&mut unpacked);
    read.expect("gzip");
    assert_eq!(unpacked, plain.body);

    let small = get(&cloud, "/v7/device?$select=id&$top=1", &[("Accept-Encoding", "gzip")]);
    assert_eq!(small.header("Content-Encoding"), None);
}

#[test]
fn a_long_url_is_refused() {
    let cloud = start();
    let ids: Vec<_> = (100_000..102_500).map(|id| id.to_string()).collect();
    let target = format!("/v7/device?$select=id&$filter=id%20in%20({})", ids.join(","));
    let answer = get(&cloud, &target, &[]);
    assert_eq!(answer.status, "HTTP/1.1 431 Request Header Fields Too Large");
}

#[test]
fn an_idle_connection_is_closed() {
    let cloud = start();
    let mut stream = TcpStream::connect(cloud.addr()).expect("the cloud listens");
    let mut answer = Vec::new();
    for _ in 0..2 {
        stream.write_all(b"GET /ping HTTP/1.1\r\n\r\n").expect("sent");
    }
    let start = Instant::now();
    stream.read_to_end(&mut answer).expect("closed");
    let idle = start.elapsed();
    assert!(answer.ends_with(b"OK"));
    assert!(idle >= cloud::IDLE - Duration::from_millis(100), "closed after {idle:?}");
    assert_eq!(cloud.requests().len(), 2);
}
