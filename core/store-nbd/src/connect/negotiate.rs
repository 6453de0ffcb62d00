//! The handshake.

use everdisk_proto::nbd::wire::{EXPORT_NAME_ZEROES, handshake_flag, opt, rep};

use super::{ConnectError, stream::Stream, tls};
use crate::{
    address::{Address, Tls},
    codec::handshake::{
        EXPORT_NAME_BYTES, GREETING_BYTES, HandshakeError, Information, OPTION_REPLIES_MAX, OPTION_REPLY_BYTES,
        Refusal, context, export_name, go, greeting, information, is_error, meta_context, option, refusal, reply_head,
    },
    config::{DEFAULT_BLOCKS, Offer},
};

/// What the data of replies to an option are passed to, with the type of the reply.
type Take<'a> = &'a mut dyn FnMut(u32, &[u8]) -> Result<(), HandshakeError>;

/// Greets the server and agrees on everything.
pub(super) fn run(stream: &mut Stream, address: &Address) -> Result<Offer, ConnectError> {
    let mut bytes = [0; GREETING_BYTES];
    stream.read_exact(&mut bytes).map_err(ConnectError::io("read the server's greeting"))?;
    let flags = greeting(&bytes)?;
    stream.write_all(&flags.to_be_bytes()).map_err(ConnectError::io("answer the server's greeting"))?;
    if let Tls::Required(files) = &address.tls {
        ask(stream, opt::STARTTLS, &[], &mut |_, _| Ok(()))?.map_err(HandshakeError::NoTls)?;
        let client = tls::client(&address.server, files)?;
        stream.encrypt(client).map_err(ConnectError::io("agree on TLS with the server"))?;
    }
    let structured = optional(stream, opt::STRUCTURED_REPLY, &[], &mut |_, _| Ok(()))?;
    let mut id = None;
    if structured {
        let mut take = |kind, data: &[u8]| {
            if kind == rep::META_CONTEXT {
                id = context(data)?.or(id);
            }
            Ok(())
        };
        if !optional(stream, opt::SET_META_CONTEXT, &meta_context(&address.export), &mut take)? {
            id = None;
        }
    }
    let offer = Offer { size: 0, flags: 0, blocks: DEFAULT_BLOCKS, structured, context: id };
    choose(stream, address, offer, flags)
}

/// GO, or EXPORT_NAME if the server does not know GO.
fn choose(stream: &mut Stream, address: &Address, mut offer: Offer, flags: u32) -> Result<Offer, ConnectError> {
    let mut export = None;
    let mut take = |kind, data: &[u8]| {
        if kind == rep::INFO {
            match information(data)? {
                Information::Export { size, flags } => export = Some((size, flags)),
                Information::Blocks(blocks) => offer.blocks = blocks,
                Information::Other => {}
            }
        }
        Ok(())
    };
    let (size, its_flags) = match ask(stream, opt::GO, &go(&address.export), &mut take)? {
        Ok(()) => {
            let why = "it accepts the export without telling its size";
            export.ok_or(HandshakeError::Malformed { option: opt::GO, kind: rep::ACK, why })?
        }
        Err(refusal) if refusal.kind == rep::ERR_UNSUP => by_name(stream, &address.export, flags)?,
        Err(refusal) if refusal.kind == rep::ERR_UNKNOWN => {
            return Err(HandshakeError::NoExport { export: address.export.clone(), refusal }.into());
        }
        Err(refusal) => return Err(refused(stream, opt::GO, refusal).into()),
    };
    offer.size = size;
    offer.flags = its_flags;
    Ok(offer)
}

fn by_name(stream: &mut Stream, export: &str, flags: u32) -> Result<(u64, u16), ConnectError> {
    let request = option(opt::EXPORT_NAME, export.as_bytes());
    stream.write_all(&request).map_err(ConnectError::io("name the export"))?;
    let mut bytes = [0; EXPORT_NAME_BYTES];
    // A server that does not have the export can only hang up.
    let read = ConnectError::io("read what the server says of the export (it hangs up if it has none of that name)");
    stream.read_exact(&mut bytes).map_err(read)?;
    if flags & u32::from(handshake_flag::NO_ZEROES) == 0 {
        let zeroes = &mut [0; EXPORT_NAME_ZEROES];
        stream
            .read_exact(zeroes)
            .map_err(ConnectError::io("read the zeroes after what the server says of the export"))?;
    }
    Ok(export_name(&bytes))
}

/// An option that the server may refuse.
fn optional(stream: &mut Stream, which: u32, data: &[u8], take: Take<'_>) -> Result<bool, ConnectError> {
    match ask(stream, which, data, take)? {
        Ok(()) => Ok(true),
        // The server knows the option, but no export of that name; GO tells that better.
        Err(refusal) if matches!(refusal.kind, rep::ERR_UNSUP | rep::ERR_POLICY | rep::ERR_UNKNOWN) => Ok(false),
        Err(refusal) => Err(refused(stream, which, refusal).into()),
    }
}

fn refused(stream: &Stream, option: u32, refusal: Refusal) -> HandshakeError {
    if refusal.kind == rep::ERR_TLS_REQD && !stream.is_encrypted() {
        return HandshakeError::TlsRequired;
    }
    HandshakeError::Refused { option, refusal }
}

/// Sends an option and reads replies until the last one.
fn ask(stream: &mut Stream, which: u32, data: &[u8], take: Take<'_>) -> Result<Result<(), Refusal>, ConnectError> {
    stream.write_all(&option(which, data)).map_err(ConnectError::io("send an option"))?;
    for _ in 0..OPTION_REPLIES_MAX {
        let mut head = [0; OPTION_REPLY_BYTES];
        stream.read_exact(&mut head).map_err(ConnectError::io("read the reply to an option"))?;
        let (kind, len) = reply_head(&head, which)?;
        let mut data = vec![0; len];
        stream.read_exact(&mut data).map_err(ConnectError::io("read the reply to an option"))?;
        if is_error(kind) {
            return Ok(Err(refusal(kind, &data)));
        }
        if kind == rep::ACK {
            return Ok(Ok(()));
        }
        take(kind, &data)?;
    }
    let why = "the replies to this option do not end";
    Err(HandshakeError::Malformed { option: which, kind: rep::INFO, why }.into())
}
