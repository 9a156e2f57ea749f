//! The API misbehaves, in one way after another, under the real binary at its most talkative. Whatever the fault: the
//! list stays, the reason is told, the key is not, the next try comes when it should, and all is well once the fault ends.
//! `docs/faults.md` has each of them.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::Stdio;
use std::sync::mpsc::channel;
use std::sync::{Arc, LazyLock, Mutex};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use crate::support::binary::{BINARY, sidecar};
use crate::support::cloud::{self, Cloud, KEY, Reply, Seen, Step};
use crate::support::doc;
use crate::support::fleet::{gateway, gateways};
use crate::support::prometheus::promtool_check_config;
use crate::support::sidecar::{PATIENCE, Running, Sidecar, finish};
use baletheus::config;
use base64::prelude::{BASE64_STANDARD, Engine};
use flate2::Compression;
use flate2::read::GzDecoder;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};
use reqwest::header::HeaderValue;
use rustls::pki_types::PrivateKeyDer;
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::{Value, json};

/// Rows at a time: most of each is waiting.
const WORKERS: usize = 16;

type Interceptor = Box<dyn FnMut(&Seen, &[u8]) -> Option<Reply> + Send>;

/// A row of the table.
struct Fault {
    /// As in `docs/faults.md`.
    name: &'static str,
    inject: Inject,
    then: Then,
    /// What else is in the line of the log.
    also: &'static str,
    /// Devices before the fault; one more comes during it.
    devices: u64,
    /// The most that it may take, in KiB, however large an answer gets.
    memory: u64,
    env: Vec<(&'static str, &'static str)>,
    https: bool,
    /// How the API answers while all is well, if not as ever.
    before: Option<Interceptor>,
}

enum Inject {
    Answers(Interceptor),
    /// What is spoken on connections that come from now on.
    Speaks(Speech),
    /// Nobody listens.
    Nobody,
}

enum Then {
    /// A refresh fails, with all of this in one line.
    Fails(&'static [&'static str], Next),
    /// The list has the devices with these ids, and the log has this.
    Lists(&'static [u64], &'static str),
    /// Nothing new is seen, and nothing said of it.
    Quiet,
}

/// When the next try comes.
enum Next {
    /// After the back-off, which begins with a second, or at random with half of it.
    BacksOff,
    /// After as many seconds as the API says.
    After(u64),
    /// After an hour: the API says longer than is good for anybody.
    Hour,
    /// After the back-off, but one try takes so long that another is not waited for.
    Once,
}

use Next::{After, BacksOff, Hour, Once};
use Then::{Fails, Lists, Quiet};

impl Fault {
    fn new(name: &'static str, inject: Inject, then: Then) -> Self {
        Fault {
            name,
            inject,
            then,
            also: "",
            devices: 5,
            memory: 200 << 10,
            env: Vec::new(),
            https: false,
            before: None,
        }
    }

    fn env(mut self, name: &'static str, value: &'static str) -> Self {
        self.env.push((name, value));
        self
    }
}

/// The API answers so.
fn answers(
    name: &'static str, then: Then, answer: impl FnMut(&Seen, &[u8]) -> Option<Reply> + Send + 'static,
) -> Fault {
    Fault::new(name, Inject::Answers(Box::new(answer)), then)
}

/// It goes on like this once the request is there.
fn steps(
    name: &'static str, said: &'static [&'static str], make: impl Fn(&[u8]) -> Vec<Step> + Send + 'static,
) -> Fault {
    answers(name, Fails(said, BacksOff), move |_, due| Some(Reply::steps(make(due)))).env("API_TIMEOUT", "1s")
}

/// An `ETag` that must never be sent back: no answer with it is a list of devices.
const ETAG_OF_NOTHING: &str = "W/\"nothing\"";

/// An answer that is an error.
fn status(
    name: &'static str, status: u16, headers: &[(&'static str, &'static str)], body: &'static str, then: Then,
) -> Fault {
    let headers = [headers, &[("ETag", ETAG_OF_NOTHING)]].concat();
    answers(name, then, move |_, _| Some(Reply::status(status, &headers, body.as_bytes())))
}

/// An answer that is called right and is not.
fn body(name: &'static str, body: impl Into<Vec<u8>>, said: &'static str) -> Fault {
    let (body, headers) = (body.into(), [("ETag", ETAG_OF_NOTHING), ("Content-Type", "application/json")]);
    let answer = move |_: &Seen, _: &[u8]| Some(Reply::status(200, &headers, &body));
    Fault { also: said, ..answers(name, Fails(&[NO_PAGE], BacksOff), answer) }
}

const NO_PAGE: &str = "is no page of devices: ";

/// A page of six devices in which the third is this.
fn third(name: &'static str, ids: &'static [u64], said: &'static str, third: impl Into<String>) -> Fault {
    let third = third.into();
    answers(name, Lists(ids, said), move |_, _| {
        let device = |id| if id == 3 { third.clone() } else { gateway(id).to_string() };
        let body = format!("{{\"d\":[{}]}}", (1..=6).map(device).collect::<Vec<_>>().join(","));
        Some(Reply::status(200, &[], body.as_bytes()))
    })
}

const OTHERS: &[u64] = &[1, 2, 4, 5, 6];
const ALL: &[u64] = &[1, 2, 3, 4, 5, 6];

/// The third device, but for this.
fn edited(edit: impl FnOnce(&mut Value)) -> String {
    let mut device = gateway(3);
    edit(&mut device);
    device.to_string()
}

/// A device whose record cannot be used.
fn damaged(name: &'static str, said: &'static str, edit: impl FnOnce(&mut Value)) -> Fault {
    third(name, OTHERS, said, edited(edit))
}

/// Over TLS, a new connection for each request, and then a handshake that goes wrong.
fn handshake(name: &'static str, said: &'static [&'static str], speech: Speech) -> Fault {
    let close: Interceptor = Box::new(|_, due| Some(Reply::steps([Step::Send(due.to_vec()), Step::Close])));
    let fault = Fault::new(name, Inject::Speaks(speech), Fails(said, BacksOff)).env("BALENA_CA_FILE", "ca.pem");
    Fault { https: true, before: Some(close), ..fault.env("API_TIMEOUT", "1s") }
}

const TRUST: &[&str] = &["cannot trust", "is this device's clock right?", "--ca-file (BALENA_CA_FILE)"];

/// A certificate that must not be trusted.
fn certificate(name: &'static str, said: &'static str, server: &Arc<ServerConfig>) -> Fault {
    Fault { also: said, ..handshake(name, TRUST, Speech::Tls(server.clone())) }
}

#[rustfmt::skip] // a table
fn faults() -> Vec<Fault> {
    const HTML: &[(&str, &str)] = &[("Content-Type", "text/html")];
    const DATE: (&str, &str) = ("Date", "Thu, 01 Jan 1970 00:00:10 GMT");
    const BROKE: &[&str] = &["the answer of", "broke off"];
    const LATE: &[&str] = &["no whole answer from", "within 1s"];
    let retry = |name, value, next| status(name, 429, &[("Retry-After", value), DATE], "\"Too Many Requests\"",
        Fails(&["429 Too Many Requests", "\"Too Many Requests\"", "a longer --refresh (REFRESH_RATE) helps"], next));
    let gone: Arc<TcpListener> = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port").into();
    let certificates = &*CERTIFICATES;
    let mut faults = vec![
        // What takes longest comes first: a flood of data.
        Fault {
            memory: 300 << 10, // it is a million devices
            ..answers("pages-endless", Fails(&["it goes on without end"], Once), |seen, _| {
                Some(Reply::status(200, &[], &bare_page(after(seen))))
            })
        },
        answers("gzip-bomb", Fails(&["the device after id 0 is too large, and has no name"], Once), |_, _| {
            static BOMB: LazyLock<Vec<u8>> = LazyLock::new(|| gzip_answer(&gzip(&vec![b' '; 100 << 20])));
            Some(Reply::steps([Step::Send(BOMB.clone())]))
        }).env("API_TIMEOUT", "60s"),
        Fault {
            devices: 4200,
            ..answers("page-3-of-5", Fails(&["503"], BacksOff), |seen, _| {
                (after(seen) == 2000).then(|| Reply::status(503, &[("ETag", ETAG_OF_NOTHING)], b""))
            })
        },

        // What an answer says.
        status("400", 400, &[], "\"Malformed url: 'x'\"", Fails(&["400 Bad Request, \"Malformed url: 'x'\"", "please report it"], BacksOff)),
        status("401", 401, &[], "", Fails(&["401 Unauthorized", "check API_KEY", "the API's database is down"], BacksOff)),
        status("403", 403, &[], "", Fails(&["403 Forbidden", "check API_KEY"], BacksOff)),
        status("404", 404, &[], "", Fails(&["404 Not Found", "--api-url (BALENA_API_URL)"], BacksOff)),
        status("431", 431, &[], "", Fails(&["431 Request Header Fields Too Large", "fleets by id"], BacksOff)),
        retry("429-seconds", "3", After(3)),
        retry("429-date", "Thu, 01 Jan 1970 00:00:13 GMT", After(3)),
        retry("429-date-gone", "Thu, 01 Jan 1970 00:00:09 GMT", BacksOff),
        retry("429-date-far", "Fri, 31 Dec 2399 23:59:59 GMT", Hour),
        retry("429-zero", "0", BacksOff),
        retry("429-negative", "-5", BacksOff),
        retry("429-day", "86400", Hour),
        retry("429-huge", "99999999999999999999999", Hour),
        retry("429-garbage", "soon", BacksOff),
        retry("429-empty", "", BacksOff),
        retry("429-fraction", "1.5", BacksOff),
        // Neither may be counted from this machine's clock.
        status("429-date-alone", 429, &[("Retry-After", "Thu, 01 Jan 1970 00:00:13 GMT")], "", Fails(&["429"], BacksOff)),
        status("429-date-garbage", 429, &[("Retry-After", "Thu, 01 Jan 1970 00:00:13 GMT"), ("Date", "today")], "", Fails(&["429"], BacksOff)),
        status("500", 500, &[], "", Fails(&["500 Internal Server Error", "too old for a field"], BacksOff)),
        status("502-html", 502, HTML, "<html>down</html>", Fails(&["502 Bad Gateway: the API is in trouble"], BacksOff)),
        status("503", 503, &[], "", Fails(&["503 Service Unavailable", "the API is in trouble"], BacksOff)),
        status("503-retry-after", 503, &[("Retry-After", "2")], "", Fails(&["503 Service Unavailable"], After(2))),
        status("204", 204, &[], "", Fails(&["204 No Content"], BacksOff)),
        status("206", 206, &[("Content-Range", "bytes 0-9/99")], "{\"d\":[]}", Fails(&["206 Partial Content"], BacksOff)),
        status("101", 101, &[("Upgrade", "x"), ("Connection", "upgrade")], "", Fails(&["101 Switching Protocols"], BacksOff)).env("API_TIMEOUT", "1s"),
        answers("301-elsewhere", Fails(&["301 Moved Permanently, to http://127.0.0.1:", "set --api-url (BALENA_API_URL)"], BacksOff), {
            gone.set_nonblocking(true).expect("a socket");
            let gone = gone.clone();
            move |_, _| {
                let there = format!("http://{}/v7/device", gone.local_addr().unwrap());
                // Nor did the last try go there.
                let status = if gone.accept().is_ok() { 500 } else { 301 };
                Some(Reply::status(status, &[("Location", &there)], b"Moved"))
            }
        }).env("API_TIMEOUT", "1s"),
        status("307-same-host", 307, &[("Location", "/v8/device")], "", Fails(&["307 Temporary Redirect, to /v8/device"], BacksOff)),
        Fault {
            before: Some(Box::new(|_, due| plain(due).map(|body| Reply::status(200, &[], &body)))),
            ..status("304-unasked", 304, &[], "", Fails(&["304 Not Modified: the API is in trouble"], BacksOff))
        },
        answers("304-other-etag", Quiet, |_, _| Some(Reply::status(304, &[("ETag", ETAG_OF_NOTHING)], b""))),
        answers("etag-on-error", Fails(&["503"], BacksOff), |seen, _| Some(match seen.header("if-none-match") {
            Some(ETAG_OF_NOTHING) => Reply::status(304, &[], b""),
            _ => Reply::status(503, &[("ETag", ETAG_OF_NOTHING)], b"{\"d\":[]}"),
        })),
        answers("200-no-etag", Lists(ALL, "(+1 -0 ~0)"), |_, due| plain(due).map(|body| Reply::status(200, &[], &body))),

        // The connection.
        Fault::new("refused", Inject::Nobody, Fails(&["cannot reach", "Connection refused"], BacksOff)),
        steps("reset", &["the answer of", "broke off", "reset"], |_| vec![Step::Reset]),
        steps("closed", BROKE, |_| vec![Step::Close]),
        steps("hang-before-head", LATE, |_| vec![Step::Hang]),
        steps("hang-in-head", LATE, |due| vec![Step::Send(due[..30].to_vec()), Step::Hang]),
        steps("hang-in-body", LATE, |due| vec![Step::Send(due[..due.len() - 40].to_vec()), Step::Hang]),
        steps("hang-in-error", &["500 Internal Server Error"], |_| vec![
            Step::Send(b"HTTP/1.1 500 X\r\nContent-Length: 9\r\n\r\nx".to_vec()), Step::Hang]),
        steps("drip", LATE, drip),
        steps("drip-in-body", LATE, |due| {
            let (head, body) = due.split_at(due.len() - 60);
            [vec![Step::Send(head.to_vec())], drip(body)].concat()
        }),
        steps("continue-for-ever", LATE, |_| drip_of(b"HTTP/1.1 100 Continue\r\n\r\n")),
        steps("cut-plain", BROKE, |_| {
            let body = page(1..=6);
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
            vec![Step::Send([head.as_bytes(), &body[..body.len() / 2]].concat()), Step::Close]
        }),
        steps("cut-plain-unnoticed", &[NO_PAGE, "EOF while parsing"], |_| {
            let body = page(1..=6);
            vec![Step::Send([b"HTTP/1.1 200 OK\r\n\r\n", &body[..body.len() / 2]].concat()), Step::Close]
        }),
        steps("cut-gzip", BROKE, |_| {
            let sent = gzip_answer(&gzip(&page(1..=6)));
            vec![Step::Send(sent[..sent.len() / 2].to_vec()), Step::Close]
        }),
        steps("cut-reset", BROKE, |due| vec![Step::Send(due[..due.len() - 40].to_vec()), Step::Reset]),
        steps("cut-gzip-unnoticed", BROKE, |_| {
            let packed = gzip(&page(1..=6));
            vec![Step::Send(gzip_answer(&packed[..packed.len() / 2]))]
        }),
        steps("corrupt-gzip", BROKE, |_| {
            let mut packed = gzip(&page(1..=6));
            let middle = packed.len() / 2;
            packed[middle..middle + 8].iter_mut().for_each(|byte| *byte ^= 0xff);
            vec![Step::Send(gzip_answer(&packed))]
        }),
        steps("corrupt-gzip-sum", BROKE, |_| {
            let mut packed = gzip(&page(1..=6));
            let sum = packed.len() - 8;
            packed[sum] ^= 1;
            vec![Step::Send(gzip_answer(&packed))]
        }),
        steps("gzip-by-name-only", BROKE, |_| vec![Step::Send(gzip_answer(&page(1..=6)))]),
        steps("bad-chunk", BROKE, |_| vec![Step::Send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n".to_vec())]),
        steps("endless-length", BROKE, |_| vec![
            Step::Send(b"HTTP/1.1 200 OK\r\nContent-Length: 18446744073709551614\r\n\r\n{\"d\":[".to_vec()), Step::Close]),
        steps("huge-header", BROKE, |_| vec![
            Step::Send([b"HTTP/1.1 200 OK\r\nX: ", &*vec![b'x'; 2 << 20]].concat()), Step::Hang]),
        steps("many-headers", BROKE, |_| vec![
            Step::Send(["HTTP/1.1 200 OK\r\n", &"X: y\r\n".repeat(10_000), "\r\n"].concat().into_bytes()), Step::Hang]),
        steps("not-http", BROKE, |_| vec![Step::Send(b"220 mail.example.test ESMTP\r\n".to_vec()), Step::Close]),

        // TLS.
        certificate("tls-expired", "certificate expired", &certificates.expired),
        certificate("tls-not-yet", "certificate not valid yet", &certificates.early),
        certificate("tls-foreign-ca", "UnknownIssuer", &certificates.foreign),
        certificate("tls-self-signed", "UnknownIssuer", &certificates.own),
        certificate("tls-other-host", "not valid for name", &certificates.other),
        handshake("tls-to-plain", &["cannot reach https://"], Speech::Plain),
        handshake("tls-mute", LATE, Speech::Mute),
        Fault { https: false, ..handshake("plain-to-tls", BROKE, Speech::Tls(certificates.good.clone())) },

        // What a page holds.
        body("empty-body", "", "EOF while parsing"),
        body("portal", "<html>Please log in to this network</html>", "expected value"),
        body("malformed-json", page(1..=6).repeat(2), "trailing characters"),
        body("malformed-device", String::from_utf8(page(1..=6)).unwrap().replace("\"gw-3\"", "gw-3"), "expected value"),
        body("invalid-utf-8", { let mut page = page(1..=6); let at = find(&page, b"gw-3"); page[at] = 0xff; page }, "unicode"),
        body("deep-json", "[".repeat(1 << 20), "is no page of devices"),
        body("shape-array", "[]", "invalid length 0"),
        body("shape-object", "{}", "missing field `d`"),
        body("shape-null", "{\"d\":null}", "invalid type: null"),
        body("shape-object-inside", "{\"d\":{}}", "invalid type: map"),
        body("shape-text", "\"x\"", "invalid type: string"),
        body("shape-number", "1", "invalid type: integer"),
        body("shape-twice", "{\"d\":[],\"d\":[]}", "duplicate field `d`"),
        body("ids-fall", page((1..=6).rev()), "the ids do not rise"),
        answers("page-repeats", Fails(&["the ids do not rise"], BacksOff), |_, _| Some(Reply::status(200, &[], &bare_page(0)))),
        answers("page-no-ids", Fails(&["no device has an id"], BacksOff), |_, _| {
            Some(Reply::status(200, &[], format!("{{\"d\":[{}{{}}]}}", "{},".repeat(999)).as_bytes()))
        }),

        // A device.
        third("device-empty", OTHERS, "left out a device without a name: the API's record of it has no id", "{}"),
        third("device-null", OTHERS, "left out a device without a name: the API's record of it cannot be used: invalid type: null", "null"),
        third("device-text", OTHERS, "left out a device without a name: the API's record of it cannot be used: invalid type: string", "\"x\""),
        third("device-list", OTHERS, "left out a device without a name: the API's record of it cannot be used: invalid length", "[3]"),
        damaged("id-missing", "left out gw-3 (0000000): the API's record of it has no id", |it| { it.as_object_mut().unwrap().remove("id"); }),
        damaged("id-null", "left out gw-3 (0000000): the API's record of it has no id", |it| it["id"] = Value::Null),
        damaged("id-text", "left out gw-3 (0000000): the API's record of it cannot be used: invalid type: string", |it| it["id"] = "3".into()),
        damaged("id-negative", "left out gw-3 (0000000): the API's record of it cannot be used: invalid value", |it| it["id"] = (-3).into()),
        third("id-huge", OTHERS, "left out gw-3 (0000000): the API's record of it cannot be used: ", edited(|_| {}).replace("\"id\":3,", "\"id\":1e400,")),
        damaged("uuid-missing", "left out gw-3 (id 3): its uuid is not 32 or 62 hex digits", |it| { it.as_object_mut().unwrap().remove("uuid"); }),
        damaged("uuid-null", "left out gw-3 (id 3): its uuid is not 32 or 62 hex digits", |it| it["uuid"] = Value::Null),
        damaged("uuid-not-hex", "left out gw-3 (evil.ex): its uuid is not 32 or 62 hex digits", |it| it["uuid"] = "evil.example.com:80/aaaaaaaaaaaaa".into()),
        damaged("name-number", "left out a device without a name (0000000): the API's record of it cannot be used: invalid type: integer `5`", |it| it["device_name"] = 5.into()),
        third("name-lone-surrogate", OTHERS, "left out a device without a name (0000000): the API's record of it cannot be used: ", edited(|_| {}).replace("gw-3", "\\ud800")),
        damaged("tags-text", "left out gw-3 (0000000): the API's record of it cannot be used: invalid type: string", |it| it["device_tag"] = "x".into()),
        damaged("fleet-unexpanded", "left out gw-3 (0000000): the API's record of it cannot be used: invalid type: map", |it| it["belongs_to__application"] = json!({"__id": 1})),
        third("all-else-null", ALL, "changed gw-3 (0000000)", edited(|it| for (name, value) in it.as_object_mut().unwrap() {
            if !["id", "uuid", "device_name"].contains(&name.as_str()) { *value = Value::Null; }
        })),
        third("all-else-missing", ALL, "changed a device without a name (0000000)", json!({"id": 3, "uuid": gateway(3)["uuid"]}).to_string()),
        third("name-huge", ALL, "changed xxxxxxxx", edited(|it| it["device_name"] = "x".repeat(1 << 20).into())),
        third("fields-unknown", ALL, "(+1 -0 ~0)", edited(|it| it["vpn_address"] = json!({"a": [1, {"b": "x".repeat(1 << 16)}]}))),
        third("field-deep", ALL, "(+1 -0 ~0)", edited(|_| {}).replace("\"id\":3,", &format!("\"id\":3,\"deep\":{}{},", "[".repeat(100_000), "]".repeat(100_000)))),
        third("device-twice", ALL, "left out gw-3 (0000000): the API's record of it cannot be used: it comes twice", format!("{0},{0}", gateway(3))),
    ];
    // Whatever of a request the other side gives back, the key in it is not told.
    let echo = |name, then, echo: fn(&str) -> Reply| answers(name, then, move |seen, _| {
        Some(echo(seen.header("authorization").unwrap_or_default()))
    });
    faults.extend([
        echo("echo-body", Fails(&["400 Bad Request, \"Malformed header: Bearer: "], BacksOff), |key| Reply::status(400, &[], format!("\"Malformed header: {key}\"").as_bytes())),
        // Wherever the sidecar stops to read, it is within a key.
        echo("echo-body-many", Fails(&["400 Bad Request: "], BacksOff), |key| {
            Reply::status(400, &[], key.trim_start_matches("Bearer ").repeat(100).as_bytes())
        }),
        echo("echo-body-late", Fails(&["400 Bad Request: "], BacksOff), |key| {
            Reply::status(400, &[], format!("{}{key}", " ".repeat(800)).as_bytes())
        }),
        echo("echo-html", Fails(&["502 Bad Gateway: "], BacksOff), |key| Reply::status(502, HTML, key.as_bytes())),
        echo("echo-location", Fails(&["301 Moved Permanently, to http://elsewhere.invalid/?Bearer"], BacksOff), |key| {
            Reply::status(301, &[("Location", &format!("http://elsewhere.invalid/?{key}"))], b"")
        }),
        echo("echo-reason", Fails(&["500 Internal Server Error: "], BacksOff), |key| {
            Reply::steps([Step::Send(format!("HTTP/1.1 500 {key}\r\nContent-Length: 0\r\n\r\n").into_bytes())])
        }),
        echo("echo-headers", Fails(&["500 Internal Server Error: "], BacksOff), |key| {
            Reply::status(500, &[("ETag", key), ("Retry-After", key), ("Date", key), ("Content-Type", key), ("Server", key)], b"")
        }),
        echo("echo-not-http", Fails(BROKE, BacksOff), |key| Reply::steps([Step::Send(format!("{key}\r\n\r\n").into_bytes()), Step::Close])),
        echo("echo-shape", Fails(&[NO_PAGE, "invalid type: string"], BacksOff), |key| Reply::status(200, &[], json!({"d": key}).to_string().as_bytes())),
        echo("echo-device", Fails(&[NO_PAGE], BacksOff), |key| Reply::status(200, &[], json!([[{"id": key}, {"id": key}]]).to_string().replace("[[", "{\"d\":[").replace("}]]", "}],\"d\":1}").as_bytes())),
        status("hostile-error", 500, &[], "x\n1999-11-22T06:59:36.000Z ERROR forged\u{1b}[2J\u{202e}\u{61c}\0", Fails(&["500 Internal Server Error, x\\n1999", "forged\\u{1b}[2J\\u{202e}\\u{61c}\\u{0}: "], BacksOff)),
    ]);
    faults
}

#[test]
fn each_fault_is_survived() {
    let (queue, failed) = (Mutex::new(faults().into_iter()), Mutex::new(Vec::new()));
    let next = || queue.lock().unwrap().next();
    thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                while let Some(fault) = next() {
                    let (name, start) = (fault.name, Instant::now());
                    match catch_unwind(AssertUnwindSafe(|| endure(fault))) {
                        Ok(memory) => println!("{name}: {:.1?}, {} MiB", start.elapsed(), memory >> 10),
                        Err(panic) => failed.lock().unwrap().push(format!("{name}: {}", said(&*panic))),
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "{} faults were not survived:\n\n{}", failed.len(), failed.join("\n\n"));
}

fn said(panic: &(dyn Any + Send)) -> &str {
    panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref().copied()).unwrap_or("?")
}

/// The one test of each fault; tells how much memory the sidecar took, in KiB.
fn endure(fault: Fault) -> u64 {
    let Fault { name, inject, then, also, devices, memory: most_memory, env, https, before } = fault;
    // All is well.
    let speech = Arc::new(Mutex::new(if https { Speech::Tls(CERTIFICATES.good.clone()) } else { Speech::Plain }));
    let healthy_speech = speech.lock().unwrap().clone();
    let mut cloud = speaking((Ipv4Addr::LOCALHOST, 0).into(), gateways(devices), &speech);
    let addr = cloud.addr();
    if let Some(before) = before {
        cloud.intercept(before);
    }
    let url = format!("http{}://{addr}", if https { "s" } else { "" });
    let env = env.into_iter().fold(sidecar(&cloud), |sidecar, (name, value)| sidecar.env(name, value));
    let sidecar = env.env("BALENA_API_URL", &url).env("RUST_LOG", "trace");
    fs::write(sidecar.path("ca.pem"), &CERTIFICATES.ca).unwrap();
    let running = sidecar.start();
    running.wait_for(&format!("updated balena.json: {devices} targets of {devices} devices"));
    let before = Look::at(&sidecar);
    assert!(before.list == list_of(devices), "{name}");

    // It is not, and the fleet goes on meanwhile.
    match inject {
        Inject::Answers(answer) => cloud.intercept(answer),
        Inject::Speaks(other) => *speech.lock().unwrap() = other,
        Inject::Nobody => drop(std::mem::replace(&mut cloud, Cloud::start(Vec::new()))),
    }
    let from = cloud.requests().len();
    let goes_on = || cloud.change(|fleet| fleet.push(gateway(devices + 1)));
    match &then {
        Fails(said, next) => {
            // Before that, a refresh may be half way through.
            running.wait_for("refresh failed: ");
            goes_on();
            let tries = if matches!(next, Hour | Once) { 1 } else { 2 };
            let line = running.wait_for_lines("refresh failed: ", tries);
            let failed: Vec<_> = running.log().into_iter().filter(|line| line.contains("refresh failed: ")).collect();
            for said in
                [&["WARN  refresh failed: ", &url, also, "; balena.json stays as it is, next try in "], *said].concat()
            {
                assert!(line.contains(said), "{name}: not {said:?} in\n{line}");
            }
            assert!(line.len() < 2000, "{name}: {line}");
            let (shown, least) = match next {
                BacksOff | Once => (&["0s", "1s"][..], 500),
                After(seconds) => (&[["0s", "1s", "2s", "3s"][usize::try_from(*seconds).unwrap()]][..], seconds * 1000),
                Hour => (&["1h"][..], 0),
            };
            let (_, wait) = failed[0].rsplit_once("next try in ").unwrap();
            assert!(shown.contains(&wait), "{name}: {}", failed[0]);
            if let [first, second, ..] = &*failed {
                let apart = time_of(second).duration_since(time_of(first)).unwrap();
                // the log has whole milliseconds
                assert!(apart >= Duration::from_millis(least - 1), "{name}: {apart:?} between\n{first}\n{second}");
            }
            assert!(Look::at(&sidecar) == before, "{name}: the file was touched");
        }
        Lists(ids, said) => {
            goes_on();
            running.wait_for(said);
            let wanted: Vec<_> = ids.iter().map(|id| format!("{id:032x}")).collect();
            wait_until(&running, || uuids(&sidecar.list()) == wanted);
            assert!(running.log().iter().all(|line| !line.contains("refresh failed")), "{name}");
        }
        Quiet => {
            goes_on();
            cloud.wait_for_requests(from + 3, PATIENCE);
            assert!(Look::at(&sidecar) == before, "{name}: the file was touched");
            assert!(running.log().iter().all(|line| !line.contains("refresh failed")), "{name}");
        }
    }

    // All is well again.
    *speech.lock().unwrap() = healthy_speech;
    let seen = cloud.requests();
    if cloud.addr() == addr {
        cloud.heal();
    } else {
        cloud = speaking(addr, gateways(devices + 1), &speech);
    }
    running.signal("HUP");
    let wanted = list_of(devices + 1);
    wait_until(&running, || sidecar.list() == wanted);

    // Nothing stays behind.
    for seen in seen.iter().chain(&cloud.requests()) {
        let etag = seen.header("if-none-match");
        assert_ne!(etag, Some(ETAG_OF_NOTHING), "{name}: an ETag of an answer that was no list is used");
        assert!(etag.is_none_or(|etag| !etag.contains(KEY)), "{name}");
    }
    let scratch = fs::read_dir(sidecar.path(".balena.json.tmp")).unwrap().map(|file| file.unwrap().file_name());
    assert_eq!(scratch.collect::<Vec<_>>(), ["lock"], "{name}");
    let memory = peak_memory(&running);
    assert!(memory < most_memory, "{name}: it took {memory} KiB");
    no_secret(name, &sidecar, &running, KEY);
    running.signal("TERM");
    let (status, log) = running.wait();
    assert!(status.success(), "{name}: {status}");
    assert!(log.iter().any(|line| line.contains("reqwest") || line.contains("hyper")), "libraries are not heard");
    log.iter().for_each(|line| one_record(line));
    memory
}

/// What people and Prometheus can tell of the file.
#[derive(PartialEq)]
struct Look {
    list: String,
    inode: u64,
    changed: (i64, i64),
}

impl Look {
    fn at(sidecar: &Sidecar) -> Self {
        let file = fs::metadata(sidecar.path("balena.json")).unwrap();
        Look { list: sidecar.list(), inode: file.ino(), changed: (file.mtime(), file.mtime_nsec()) }
    }
}

/// Looks again and again, until it is so.
fn wait_until(running: &Running, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        let own = |line: &String| [" WARN  ", " INFO  "].iter().any(|level| line.contains(level));
        let log = || running.log().into_iter().filter(own).collect::<Vec<_>>().join("\n");
        assert!(Instant::now() < deadline, "it does not come to that:\n{}", log());
        thread::sleep(Duration::from_millis(10));
    }
}

/// The list of a healthy fleet of so many.
fn list_of(devices: u64) -> String {
    static LISTS: Mutex<BTreeMap<u64, String>> = Mutex::new(BTreeMap::new());
    let mut lists = LISTS.lock().unwrap_or_else(|broken| broken.into_inner());
    let make = || {
        let cloud = Cloud::start(gateways(devices));
        let sidecar = sidecar(&cloud);
        sidecar.oneshot();
        sidecar.list()
    };
    lists.entry(devices).or_insert_with(make).clone()
}

fn uuids(list: &str) -> Vec<String> {
    let list: Vec<Value> = serde_json::from_str(list).expect("a list");
    list.iter().map(|group| group["labels"]["uuid"].as_str().unwrap().to_owned()).collect()
}

/// The most memory that it ever had, in KiB.
fn peak_memory(running: &Running) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", running.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim_end_matches("kB").trim().parse().unwrap()
}

/// The time at the beginning of a line of the log.
fn time_of(line: &str) -> SystemTime {
    humantime::parse_rfc3339(line.split(' ').next().unwrap()).unwrap_or_else(|error| panic!("{error}: {line}"))
}

/// No part of a key is told, in any of the ways in which a library shows bytes.
fn no_secret(name: &str, sidecar: &Sidecar, running: &Running, key: &str) {
    let mut places = vec![("the log".to_owned(), running.log().join("\n"))];
    let command_line = fs::read(format!("/proc/{}/cmdline", running.id())).unwrap();
    places.push(("the command line".into(), String::from_utf8_lossy(&command_line).into_owned()));
    walk(sidecar.dir.path(), &mut |path| {
        places.push((path.display().to_string(), String::from_utf8_lossy(&fs::read(path).unwrap()).into_owned()));
    });
    let parts = key.as_bytes().windows(12);
    for part in parts.step_by(4).chain([&key.as_bytes()[key.len() - 12..]]) {
        let decimal = format!("{part:?}");
        let hex: String = part.iter().map(|byte| format!("{byte:02x}")).collect();
        for shown in [str::from_utf8(part).unwrap(), decimal.trim_matches(['[', ']']), &hex] {
            for (place, text) in &places {
                let at = text.find(shown);
                let around =
                    |at: usize| String::from_utf8_lossy(&text.as_bytes()[at.saturating_sub(200)..at]).into_owned();
                assert!(at.is_none(), "{name}: {place} has the key, after …{}", around(at.unwrap()));
            }
        }
    }
    let whole = BASE64_STANDARD.encode(key);
    assert!(places.iter().all(|(_, text)| !text.contains(&whole)), "{name}");
}

fn walk(folder: &Path, visit: &mut dyn FnMut(&Path)) {
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        match entry.file_type().unwrap() {
            kind if kind.is_dir() => walk(&entry.path(), visit),
            kind if kind.is_file() => visit(&entry.path()),
            _ => {}
        }
    }
}

/// A line of the log, as text, is a record: it begins with time and level, and nothing in it moves cursor or direction.
fn one_record(line: &str) {
    assert!(!line.starts_with("1999"), "forged: {line:?}");
    let _ = time_of(line);
    let level = line.split(' ').nth(1).unwrap();
    assert!(["ERROR", "WARN", "INFO", "DEBUG", "TRACE"].contains(&level), "{line:?}");
    let bad = |c: char| {
        c.is_control()
            || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    assert!(!line.contains(bad), "{line:?}");
}

#[test]
fn the_document_has_each_row_and_no_other() {
    let known: BTreeSet<_> = faults().iter().map(|fault| fault.name.to_owned()).collect();
    assert_eq!(known.len(), faults().len(), "two rows have one name");
    let shown = doc::rows().into_iter().flat_map(|row| row.tests);
    let shown = shown.filter(|shown| (&*shown.file, &*shown.test) == ("faults.rs", "each_fault_is_survived"));
    let told: BTreeSet<_> = shown.map(|shown| shown.row.expect("a row")).collect();
    assert_eq!(known, told, "on the left the rows of the test, on the right those of docs/faults.md");
}

#[test]
fn a_name_that_does_not_resolve_is_tried_again() {
    let cloud = Cloud::start(gateways(5));
    let sidecar = sidecar(&cloud).env("RUST_LOG", "trace");
    sidecar.oneshot();
    let before = Look::at(&sidecar);
    let sidecar = sidecar.env("BALENA_API_URL", "https://api.baletheus.invalid");
    let running = sidecar.start();
    let line = running.wait_for_lines("refresh failed: ", 2);
    assert!(line.contains("cannot reach https://api.baletheus.invalid: ") && line.contains("next try in "), "{line}");
    assert!(Look::at(&sidecar) == before, "the file was touched");
    no_secret("DNS", &sidecar, &running, KEY);
    drop(running);
    cloud.change(|fleet| fleet.push(gateway(6)));
    sidecar.env("BALENA_API_URL", cloud.url()).oneshot();
}

#[test]
fn the_wait_doubles_up_to_five_minutes_and_begins_anew() {
    let cloud = Cloud::start(gateways(5));
    let sidecar = sidecar(&cloud);
    let fail = || cloud.intercept(|_, _| Some(Reply::status(503, &[], b"")));
    let wait = |line: &str| humantime::parse_duration(line.rsplit_once("next try in ").unwrap().1).unwrap().as_secs();
    fail();
    let running = sidecar.start();
    for failure in 0..12 {
        let line = running.wait_for_lines("refresh failed: ", failure + 1);
        let most = 300.min(1 << failure);
        // of 0.5 s to 1 s whole seconds are shown
        assert!((most / 2..=most).contains(&wait(&line)), "failure {failure}: {line}");
        running.signal("HUP");
    }
    running.wait_for_lines("refresh failed: ", 13);
    cloud.heal();
    running.signal("HUP");
    running.wait_for("updated balena.json: 5 targets");
    fail();
    let line = running.wait_for_lines("refresh failed: ", 14);
    assert!(wait(&line) <= 1, "{line}");
}

#[test]
fn devices_that_change_between_two_pages_are_neither_lost_nor_doubled() {
    let cloud = Cloud::start(gateways(2500));
    let sidecar = sidecar(&cloud);
    let running = sidecar.start();
    running.wait_for("updated balena.json: 2500 targets");
    let (asks, asked) = channel();
    let (go, goes) = channel();
    cloud.intercept(move |seen, _| {
        if after(seen) == 1000 && asks.send(()).is_ok() {
            let _ = goes.recv(); // the first time; later nobody waits any more
        }
        None
    });
    asked.recv_timeout(PATIENCE).expect("the second page is asked for");
    drop(asked);
    // The first page is told, the second is on its way, the third is not asked for yet.
    cloud.change(|fleet| {
        fleet.retain(|device| device["id"] != 5 && device["id"] != 1500);
        fleet.iter_mut().find(|device| device["id"] == 2400).unwrap()["device_name"] = "renamed".into();
        fleet.push(gateway(2501));
    });
    go.send(()).expect("the cloud waits");
    drop(go);
    // What went is there until the next refresh, and nothing is there twice.
    running.wait_for("updated balena.json: 2501 targets of 2501 devices (+1 -0 ~1)");
    running.wait_for("updated balena.json: 2499 targets of 2499 devices (+0 -2 ~0)");
    let wanted: Vec<_> = (1..=2501).filter(|id| ![5, 1500].contains(id)).map(|id| format!("{id:032x}")).collect();
    assert_eq!(uuids(&sidecar.list()), wanted);
    assert!(sidecar.list().contains("\"renamed\""));
}

#[test]
fn a_rotated_key_needs_no_restart_and_a_lost_one_is_kept() {
    const ROTATED: &str = "rotated-named-key-77e0c45d1b9f2a38";
    let cloud = Cloud::start(gateways(5));
    let folder = tempfile::tempdir().unwrap(); // not in the sidecar's own, where the key must not be found
    let file = folder.path().join("key");
    fs::write(&file, format!("{KEY}\n")).unwrap();
    let sidecar = sidecar(&cloud).env_remove("API_KEY").env("API_KEY_FILE", file.to_str().unwrap());
    let sidecar = sidecar.env("RUST_LOG", "trace");
    let running = sidecar.start();
    running.wait_for("updated balena.json: 5 targets");
    let failures = || running.log().iter().filter(|line| line.contains("refresh failed: ")).count();
    let more = |count: u64| {
        cloud.change(|fleet| fleet.push(gateway(count)));
        running.signal("HUP");
        running.wait_for(&format!("updated balena.json: {count} targets of {count} devices (+1 -0 ~0)"));
    };

    // The API has the new key first, and the file a moment later.
    cloud.set_key(ROTATED);
    let line = running.wait_for("refresh failed: ");
    assert!(line.contains("401 Unauthorized: check API_KEY"), "{line}");
    fs::write(&file, ROTATED).unwrap();
    more(6);
    // The other way round it costs not even a refresh.
    let before = failures();
    fs::write(&file, KEY).unwrap();
    cloud.set_key(KEY);
    more(7);
    assert_eq!(failures(), before);

    let garbage: [(&str, Option<&[u8]>); 7] = [
        ("gone", None),
        ("empty", Some(b"")),
        ("blank", Some(b" \n")),
        ("two words", Some(b"no key")),
        ("two lines", Some(b"no\nkey")),
        ("not ASCII", Some("schlüssel".as_bytes())),
        ("not UTF-8", Some(b"\xff\xfe\x00k")),
    ];
    for (count, (what, content)) in (8..).zip(garbage) {
        cloud.intercept(|_, _| Some(Reply::status(401, &[], b"")));
        match content {
            Some(content) => fs::write(&file, content).unwrap(),
            None => fs::remove_file(&file).unwrap(),
        }
        let line = running.wait_for_lines("refresh failed: ", failures() + 1);
        assert!(line.contains("401 Unauthorized: check API_KEY"), "{what}: {line}");
        let kept = format!("Bearer {KEY}");
        assert!(
            cloud.requests().last().unwrap().header("authorization") == Some(&kept),
            "{what}: the key was forgotten"
        );
        cloud.heal();
        more(count);
    }
    fs::remove_file(&file).unwrap();
    fs::create_dir(&file).unwrap();
    cloud.intercept(|_, _| Some(Reply::status(401, &[], b"")));
    running.wait_for_lines("refresh failed: ", failures() + 1);
    cloud.heal();
    more(15);
    for key in [KEY, ROTATED] {
        no_secret("rotation", &sidecar, &running, key);
    }
}

#[test]
fn a_key_is_in_no_debug_output_no_help_and_no_error() {
    for name in ["API_KEY", "BALENA_API_URL"] {
        let var = |asked: &str| match asked {
            "API_KEY" => Some(OsString::from(KEY)),
            _ if asked == name => Some("https://api.example.test".into()),
            _ => None,
        };
        let config = config::discovery(&config::command().get_matches_from(["baletheus"]), &var).unwrap();
        for shown in [format!("{config:?}"), format!("{config:#?}"), format!("{:?}", config.api.key)] {
            assert!(shown.contains("ApiKey(…)") && !shown.contains(&KEY[..8]), "{shown}");
        }
        assert_eq!(config.api.key.current().secret(), KEY);
    }
    // What a panic would say, if a key could be one that no header takes.
    let error = HeaderValue::from_str(&format!("Bearer {KEY}\n")).unwrap_err();
    assert!(!format!("{error:?} {error}").contains(&KEY[..8]));

    let sidecar = Sidecar::new(BINARY);
    let run = |key: &str, args: &[&str]| {
        let mut command = sidecar.command();
        command.env("API_KEY", key).args(args).stdin(Stdio::null());
        let output = finish(command);
        (output.status.code(), String::from_utf8([output.stdout, output.stderr].concat()).unwrap())
    };
    let (code, help) = run(KEY, &["--help"]);
    assert!(code == Some(0) && help.contains("API_KEY") && !help.contains(&KEY[..8]), "{help}");
    for bad in
        ["simulated\nnamed", "simulated named", "simulatéd", "simulated\tnamed", "simulated\u{7f}", "simulated\r\nX: y"]
    {
        let (code, said) = run(bad, &["--oneshot"]);
        assert!(
            code == Some(2) && said.contains("API_KEY contains a line break, a blank or a non-ASCII character"),
            "{said}"
        );
        assert!(!said.contains("simulat"), "{said}");
    }
}

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
    let tags: Vec<_> = (0..1000).map(|n| json!({"tag_key": format!("k{n}"), "value": "\n".repeat(1000)})).collect();
    devices.extend([tagged("many", exporters(16)), tagged("flood", exporters(17)), tagged("tags", tags.into())]);
    for (id, device) in (1..).zip(&mut devices) {
        device["id"] = id.into();
        if device["uuid"].as_str().is_some_and(|uuid| uuid.starts_with("000")) {
            device["uuid"] = format!("{id:032x}").into();
        }
    }
    let cloud = Cloud::start(devices);
    for (address, format) in [("vpn", "text"), ("public", "json"), ("lan", "text"), ("vpn", "json")] {
        let sidecar = sidecar(&cloud).env("LOG_LEVEL", "debug").env("LOG_FORMAT", format);
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
                assert!(value.as_str().unwrap().len() <= 1024, "{name}");
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

// ---- what is sent ----

fn page(ids: impl Iterator<Item = u64>) -> Vec<u8> {
    json!({"d": ids.map(gateway).collect::<Vec<_>>()}).to_string().into_bytes()
}

/// A full page of devices that are no more than an id.
fn bare_page(after: u64) -> Vec<u8> {
    let devices: Vec<_> = (after + 1..=after + 1000).map(|id| format!("{{\"id\":{id}}}")).collect();
    format!("{{\"d\":[{}]}}", devices.join(",")).into_bytes()
}

/// Above which id a page is asked for.
fn after(seen: &Seen) -> u64 {
    let (_, rest) = seen.target.split_once("(id%20gt%20").expect("a page");
    rest.split(')').next().unwrap().parse().expect("an id")
}

fn find(text: &[u8], part: &[u8]) -> usize {
    text.windows(part.len()).position(|window| window == part).expect("it is there")
}

fn drip(bytes: &[u8]) -> Vec<Step> {
    bytes.iter().flat_map(|byte| [Step::Send(vec![*byte]), Step::Pause(Duration::from_millis(100))]).collect()
}

fn drip_of(again_and_again: &[u8]) -> Vec<Step> {
    (0..100).flat_map(|_| [Step::Send(again_and_again.to_vec()), Step::Pause(Duration::from_millis(100))]).collect()
}

fn gzip(body: &[u8]) -> Vec<u8> {
    cloud::gzip(body, Compression::fast())
}

/// A whole answer that is said to be packed.
fn gzip_answer(packed: &[u8]) -> Vec<u8> {
    let head = format!(
        "HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nETag: {ETAG_OF_NOTHING}\r\nContent-Length: {}\r\n\r\n",
        packed.len()
    );
    [head.as_bytes(), packed].concat()
}

/// The body of an answer of the simulated cloud, if it is one with a body.
fn plain(due: &[u8]) -> Option<Vec<u8>> {
    if !due.starts_with(b"HTTP/1.1 200") {
        return None;
    }
    let (head, body) = due.split_at(find(due, b"\r\n\r\n") + 4);
    if !String::from_utf8_lossy(head).contains("gzip\r\n") {
        return Some(body.to_vec());
    }
    let chunk = &body[find(body, b"\r\n") + 2..]; // the only one
    let mut plain = Vec::new();
    GzDecoder::new(chunk).read_to_end(&mut plain).expect("gzip");
    Some(plain)
}

// ---- what it is sent over ----

#[derive(Clone)]
enum Speech {
    Plain,
    Tls(Arc<ServerConfig>),
    /// Listens and never says anything.
    Mute,
}

trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

/// A cloud that speaks like this, which may change.
fn speaking(addr: SocketAddr, devices: Vec<Value>, speech: &Arc<Mutex<Speech>>) -> Cloud {
    let speech = speech.clone();
    Cloud::start_over(addr, devices, move |mut stream: TcpStream| {
        let speech = speech.lock().unwrap().clone();
        Ok(match speech {
            Speech::Plain => Box::new(stream) as Box<dyn Stream>,
            Speech::Tls(config) => {
                let connection = ServerConnection::new(config).map_err(io::Error::other)?;
                Box::new(StreamOwned::new(connection, stream))
            }
            Speech::Mute => {
                io::copy(&mut stream, &mut io::sink())?;
                return Err(io::ErrorKind::TimedOut.into());
            }
        })
    })
}

/// Those of servers.
struct Certificates {
    /// The one that the sidecar is told to trust, as PEM.
    ca: String,
    good: Arc<ServerConfig>,
    expired: Arc<ServerConfig>,
    early: Arc<ServerConfig>,
    foreign: Arc<ServerConfig>,
    own: Arc<ServerConfig>,
    other: Arc<ServerConfig>,
}

static CERTIFICATES: LazyLock<Certificates> = LazyLock::new(|| {
    let authority = |name: &str| {
        let mut params = CertificateParams::new([]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        (certificate, Issuer::new(params, key))
    };
    let ((root, ca), (_, foreign)) = (authority("the one"), authority("another"));
    let pem = BASE64_STANDARD.encode(root.der());
    let made = |host: &str, from: i32, until: i32, by: Option<&Issuer<KeyPair>>| {
        let mut params = CertificateParams::new([host.to_owned()]).unwrap();
        (params.not_before, params.not_after) = (date_time_ymd(from, 1, 1), date_time_ymd(until, 1, 1));
        let key = KeyPair::generate().unwrap();
        let certificate = match by {
            Some(issuer) => params.signed_by(&key, issuer),
            None => params.self_signed(&key),
        };
        let (chain, key) = (vec![certificate.unwrap().der().clone()], PrivateKeyDer::Pkcs8(key.serialize_der().into()));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        Arc::new(config.with_no_client_auth().with_single_cert(chain, key).unwrap())
    };
    Certificates {
        ca: format!("-----BEGIN CERTIFICATE-----\n{pem}\n-----END CERTIFICATE-----\n"),
        good: made("127.0.0.1", 2020, 2120, Some(&ca)),
        expired: made("127.0.0.1", 2020, 2021, Some(&ca)),
        early: made("127.0.0.1", 2119, 2120, Some(&ca)),
        foreign: made("127.0.0.1", 2020, 2120, Some(&foreign)),
        own: made("127.0.0.1", 2020, 2120, None),
        other: made("api.balena-cloud.com", 2020, 2120, Some(&ca)),
    }
});
