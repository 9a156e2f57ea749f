//! The table of faults: what the API does, and what has to come of it.

use std::net::{Ipv4Addr, TcpListener};
use std::sync::{Arc, LazyLock};

use crate::support::cloud::{Reply, Seen, Step};
use crate::support::fleet::gateway;
use rustls::ServerConfig;
use serde_json::{Value, json};

use super::wire::{CERTIFICATES, Speech, after, bare_page, drip, drip_of, find, gzip, gzip_answer, page, plain};

pub type Interceptor = Box<dyn FnMut(&Seen, &[u8]) -> Option<Reply> + Send>;

/// A row of the table.
pub struct Fault {
    /// As in `docs/dev/faults.md`.
    pub name: &'static str,
    pub inject: Inject,
    pub then: Then,
    /// What else is in the line of the log.
    pub also: &'static str,
    /// Devices before the fault; one more comes during it.
    pub devices: u64,
    /// The most that it may take, in KiB, however large an answer gets.
    pub memory: u64,
    pub env: Vec<(&'static str, &'static str)>,
    pub https: bool,
    /// How the API answers while all is well, if not as in the other rows.
    pub before: Option<Interceptor>,
}

pub enum Inject {
    Answers(Interceptor),
    /// What is spoken on connections that come from now on.
    Speaks(Speech),
    /// Nobody listens.
    Nobody,
}

pub enum Then {
    /// A refresh fails, with all of this in one line.
    Fails(&'static [&'static str], Next),
    /// The list has the devices with these ids, and the log has this.
    Lists(&'static [u64], &'static str),
    /// The list stays, and the log has nothing new.
    Quiet,
}

/// When the next try comes.
pub enum Next {
    /// After the back-off, which begins with a second, or at random with half of it.
    BacksOff,
    /// After as many seconds as the API says.
    After(u64),
    /// After an hour, the longest wait, since the API asks for more.
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
pub fn answers(
    name: &'static str, then: Then, answer: impl FnMut(&Seen, &[u8]) -> Option<Reply> + Send + 'static,
) -> Fault {
    Fault::new(name, Inject::Answers(Box::new(answer)), then)
}

/// It goes on like this once the request is there.
pub fn steps(
    name: &'static str, said: &'static [&'static str], make: impl Fn(&[u8]) -> Vec<Step> + Send + 'static,
) -> Fault {
    answers(name, Fails(said, BacksOff), move |_, due| Some(Reply::steps(make(due)))).env("API_TIMEOUT", "1s")
}

/// An `ETag` that must never be sent back: no answer with it is a list of devices.
pub const ETAG_OF_NOTHING: &str = "W/\"nothing\"";

/// An answer that is an error.
pub fn status(
    name: &'static str, status: u16, headers: &[(&'static str, &'static str)], body: &'static str, then: Then,
) -> Fault {
    let headers = [headers, &[("ETag", ETAG_OF_NOTHING)]].concat();
    answers(name, then, move |_, _| Some(Reply::status(status, &headers, body.as_bytes())))
}

/// An answer that is called right and is not.
pub fn body(name: &'static str, body: impl Into<Vec<u8>>, said: &'static str) -> Fault {
    let (body, headers) = (body.into(), [("ETag", ETAG_OF_NOTHING), ("Content-Type", "application/json")]);
    let answer = move |_: &Seen, _: &[u8]| Some(Reply::status(200, &headers, &body));
    Fault { also: said, ..answers(name, Fails(&[NO_PAGE], BacksOff), answer) }
}

pub const NO_PAGE: &str = "is no page of devices: ";

/// A page of six devices in which the third is this.
pub fn third(name: &'static str, ids: &'static [u64], said: &'static str, third: impl Into<String>) -> Fault {
    let third = third.into();
    answers(name, Lists(ids, said), move |_, _| {
        let device = |id| if id == 3 { third.clone() } else { gateway(id).to_string() };
        let body = format!("{{\"d\":[{}]}}", (1..=6).map(device).collect::<Vec<_>>().join(","));
        Some(Reply::status(200, &[], body.as_bytes()))
    })
}

pub const OTHERS: &[u64] = &[1, 2, 4, 5, 6];

pub const ALL: &[u64] = &[1, 2, 3, 4, 5, 6];

/// The third device, but for this.
pub fn edited(edit: impl FnOnce(&mut Value)) -> String {
    let mut device = gateway(3);
    edit(&mut device);
    device.to_string()
}

/// A device whose record cannot be used.
pub fn damaged(name: &'static str, said: &'static str, edit: impl FnOnce(&mut Value)) -> Fault {
    third(name, OTHERS, said, edited(edit))
}

/// Over TLS, a new connection for each request, and then a handshake that goes wrong.
pub fn handshake(name: &'static str, said: &'static [&'static str], speech: Speech) -> Fault {
    let close: Interceptor = Box::new(|_, due| Some(Reply::steps([Step::Send(due.to_vec()), Step::Close])));
    let fault = Fault::new(name, Inject::Speaks(speech), Fails(said, BacksOff)).env("BALENA_CA_FILE", "ca.pem");
    Fault { https: true, before: Some(close), ..fault.env("API_TIMEOUT", "1s") }
}

pub const TRUST: &[&str] = &["cannot trust", "is this device's clock right?", "--ca-file (CA_FILE)"];

/// A certificate that must not be trusted.
pub fn certificate(name: &'static str, said: &'static str, server: &Arc<ServerConfig>) -> Fault {
    Fault { also: said, ..handshake(name, TRUST, Speech::Tls(server.clone())) }
}

#[rustfmt::skip] // a table
pub fn faults() -> Vec<Fault> {
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
        status("401", 401, &[], "", Fails(&["401 Unauthorized", "check API_KEY", "its database is down"], BacksOff)),
        status("403", 403, &[], "", Fails(&["403 Forbidden", "check API_KEY"], BacksOff)),
        status("403-html", 403, HTML, "<html>blocked</html>", Fails(&["403 Forbidden: a web firewall or a proxy answers"], BacksOff)),
        status("404", 404, &[], "", Fails(&["404 Not Found", "--api-url (API_URL)"], BacksOff)),
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
        status("204", 204, &[], "", Fails(&["204 No Content: balena's API does not send this status: is --api-url (API_URL) right"], BacksOff)),
        status("206", 206, &[("Content-Range", "bytes 0-9/99")], "{\"d\":[]}", Fails(&["206 Partial Content"], BacksOff)),
        status("101", 101, &[("Upgrade", "x"), ("Connection", "upgrade")], "", Fails(&["101 Switching Protocols"], BacksOff)).env("API_TIMEOUT", "1s"),
        answers("301-elsewhere", Fails(&["301 Moved Permanently, to http://127.0.0.1:", "set --api-url (API_URL)"], BacksOff), {
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
            ..status("304-unasked", 304, &[], "", Fails(&["304 Not Modified: balena's API does not send this status"], BacksOff))
        },
        answers("304-other-etag", Quiet, |_, _| Some(Reply::status(304, &[("ETag", ETAG_OF_NOTHING)], b""))),
        status("coding", 200, &[("Content-Encoding", "br")], "x", Fails(&["answers in the coding \"br\", which was not asked for"], BacksOff)),
        answers("etag-on-error", Fails(&["503"], BacksOff), |seen, _| Some(match seen.header("if-none-match") {
            Some(ETAG_OF_NOTHING) => Reply::status(304, &[], b""),
            _ => Reply::status(503, &[("ETag", ETAG_OF_NOTHING)], b"{\"d\":[]}"),
        })),
        answers("200-no-etag", Lists(ALL, "(devices: +1 -0 ~0)"), |_, due| plain(due).map(|body| Reply::status(200, &[], &body))),

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
        steps("not-http", &["is not HTTP"], |_| vec![Step::Send(b"220 mail.example.test ESMTP\r\n".to_vec()), Step::Close]),

        // TLS.
        certificate("tls-expired", "certificate expired", &certificates.expired),
        certificate("tls-not-yet", "certificate not valid yet", &certificates.early),
        certificate("tls-foreign-ca", "UnknownIssuer", &certificates.foreign),
        certificate("tls-self-signed", "UnknownIssuer", &certificates.own),
        handshake("tls-other-host", &["cannot trust https://", "not valid for name", "the certificate is for another host: "], Speech::Tls(certificates.other.clone())),
        handshake("tls-to-plain", &["cannot reach https://", "is https spoken on this port?"], Speech::Plain),
        handshake("tls-mute", LATE, Speech::Mute),
        Fault { https: false, ..handshake("plain-to-tls", &["is not HTTP; does it want https?"], Speech::Tls(certificates.good.clone())) },

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
        answers("page-no-ids", Fails(&["none of its records has an id"], BacksOff), |_, _| {
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
        damaged("name-number", "left out 00000000000000000000000000000003: the API's record of it cannot be used: invalid type: integer `5`", |it| it["device_name"] = 5.into()),
        third("name-lone-surrogate", ALL, "changed 00000000000000000000000000000003", edited(|_| {}).replace("gw-3", "gw\\ud800")),
        third("name-twice", ALL, "changed gw-4 (0000000)", edited(|_| {}).replace("\"device_name\":\"gw-3\"", "\"device_name\":\"gw-3\",\"device_name\":\"gw-4\"")),
        damaged("tags-text", "left out gw-3 (0000000): the API's record of it cannot be used: invalid type: string", |it| it["device_tag"] = "x".into()),
        damaged("fleet-unexpanded", "left out gw-3 (0000000): the API's record of it cannot be used: invalid type: map", |it| it["belongs_to__application"] = json!({"__id": 1})),
        third("all-else-null", ALL, "changed gw-3 (0000000)", edited(|it| for (name, value) in it.as_object_mut().unwrap() {
            if !["id", "uuid", "device_name"].contains(&name.as_str()) { *value = Value::Null; }
        })),
        third("all-else-missing", ALL, "changed 00000000000000000000000000000003", json!({"id": 3, "uuid": gateway(3)["uuid"]}).to_string()),
        third("name-huge", ALL, "changed xxxxxxxx", edited(|it| it["device_name"] = "x".repeat(1 << 20).into())),
        third("fields-unknown", ALL, "(devices: +1 -0 ~0)", edited(|it| it["vpn_address"] = json!({"a": [1, {"b": "x".repeat(1 << 16)}]}))),
        third("field-deep", ALL, "(devices: +1 -0 ~0)", edited(|_| {}).replace("\"id\":3,", &format!("\"id\":3,\"deep\":{}{},", "[".repeat(100_000), "]".repeat(100_000)))),
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
        echo("echo-location", Fails(&["301 Moved Permanently, to http://elsewhere.invalid/: "], BacksOff), |key| {
            Reply::status(301, &[("Location", &format!("http://elsewhere.invalid/?{key}"))], b"")
        }),
        status(
            "302-password",
            302,
            &[("Location", "https://me:of-mine@sso.example.org/login?token=of-mine#of-mine")],
            "",
            Fails(&["302 Found, to https://sso.example.org/login: set "], BacksOff),
        ),
        echo("echo-reason", Fails(&["500 Internal Server Error: "], BacksOff), |key| {
            Reply::steps([Step::Send(format!("HTTP/1.1 500 {key}\r\nContent-Length: 0\r\n\r\n").into_bytes())])
        }),
        echo("echo-headers", Fails(&["500 Internal Server Error: "], BacksOff), |key| {
            Reply::status(500, &[("ETag", key), ("Retry-After", key), ("Date", key), ("Content-Type", key), ("Server", key)], b"")
        }),
        echo("echo-not-http", Fails(&["is not HTTP"], BacksOff), |key| Reply::steps([Step::Send(format!("{key}\r\n\r\n").into_bytes()), Step::Close])),
        echo("echo-shape", Fails(&[NO_PAGE, "invalid type: string"], BacksOff), |key| Reply::status(200, &[], json!({"d": key}).to_string().as_bytes())),
        echo("echo-device", Fails(&[NO_PAGE], BacksOff), |key| Reply::status(200, &[], json!([[{"id": key}, {"id": key}]]).to_string().replace("[[", "{\"d\":[").replace("}]]", "}],\"d\":1}").as_bytes())),
        status("hostile-error", 500, &[], "x\n1999-11-22T06:59:36.000Z ERROR forged\u{1b}[2J\u{202e}\u{61c}\0", Fails(&["500 Internal Server Error, x\\n1999", "forged\\u{1b}[2J\\u{202e}\\u{61c}\\u{0}: "], BacksOff)),
    ]);
    faults
}
