//! What goes over the wire: pages, bytes that drip, packed bodies, and TLS with certificates of every kind.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use crate::support::cloud::{self, Cloud, Seen, Step};
use crate::support::fleet::gateway;
use base64::prelude::{BASE64_STANDARD, Engine};
use flate2::Compression;
use flate2::read::GzDecoder;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};
use rustls::pki_types::PrivateKeyDer;
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::{Value, json};

use super::table::ETAG_OF_NOTHING;

pub fn page(ids: impl Iterator<Item = u64>) -> Vec<u8> {
    json!({"d": ids.map(gateway).collect::<Vec<_>>()}).to_string().into_bytes()
}

/// A full page of devices that are no more than an id.
pub fn bare_page(after: u64) -> Vec<u8> {
    let devices: Vec<_> = (after + 1..=after + 1000).map(|id| format!("{{\"id\":{id}}}")).collect();
    format!("{{\"d\":[{}]}}", devices.join(",")).into_bytes()
}

/// Above which id a page is asked for.
pub fn after(seen: &Seen) -> u64 {
    let (_, rest) = seen.target.split_once("(id%20gt%20").expect("a page");
    rest.split(')').next().unwrap().parse().expect("an id")
}

pub fn find(text: &[u8], part: &[u8]) -> usize {
    text.windows(part.len()).position(|window| window == part).expect("it is there")
}

pub fn drip(bytes: &[u8]) -> Vec<Step> {
    bytes.iter().flat_map(|byte| [Step::Send(vec![*byte]), Step::Pause(Duration::from_millis(100))]).collect()
}

pub fn drip_of(again_and_again: &[u8]) -> Vec<Step> {
    (0..100).flat_map(|_| [Step::Send(again_and_again.to_vec()), Step::Pause(Duration::from_millis(100))]).collect()
}

pub fn gzip(body: &[u8]) -> Vec<u8> {
    cloud::gzip(body, Compression::fast())
}

/// A whole answer that is said to be packed.
pub fn gzip_answer(packed: &[u8]) -> Vec<u8> {
    let head = format!(
        "HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nETag: {ETAG_OF_NOTHING}\r\nContent-Length: {}\r\n\r\n",
        packed.len()
    );
    [head.as_bytes(), packed].concat()
}

/// The body of an answer of the simulated cloud, if it is one with a body.
pub fn plain(due: &[u8]) -> Option<Vec<u8>> {
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

#[derive(Clone)]
pub enum Speech {
    Plain,
    Tls(Arc<ServerConfig>),
    /// Listens and never says anything.
    Mute,
}

pub trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

/// A cloud that speaks like this, which may change.
pub fn speaking(addr: SocketAddr, devices: Vec<Value>, speech: &Arc<Mutex<Speech>>) -> Cloud {
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
pub struct Certificates {
    /// The one that the sidecar is told to trust, as PEM.
    pub ca: String,
    pub good: Arc<ServerConfig>,
    pub expired: Arc<ServerConfig>,
    pub early: Arc<ServerConfig>,
    pub foreign: Arc<ServerConfig>,
    pub own: Arc<ServerConfig>,
    pub other: Arc<ServerConfig>,
}

pub static CERTIFICATES: LazyLock<Certificates> = LazyLock::new(|| {
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
