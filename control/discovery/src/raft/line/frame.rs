//! What frames hold: a call is its number, its name after the name's length, and its body; an answer is the call's number,
//! whether it is what was asked for (1) or an error (0), and its body. Numbers are eight bytes in network order, bodies
//! JSON.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use flynn_api::Error;
use serde::Serialize;

/// A call that has arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// Which of the line's calls it is.
    pub number: u64,
    /// What it is.
    pub name: String,
    /// What it says.
    pub body: Bytes,
}

impl Call {
    /// As a frame. Names are ours and short: what is beyond 255 bytes is not sent.
    ///
    /// # Errors
    ///
    /// When the body cannot be written as JSON.
    pub fn encode(number: u64, name: &str, body: &impl Serialize) -> serde_json::Result<Bytes> {
        let name = &name.as_bytes()[..name.len().min(usize::from(u8::MAX))];
        let mut frame = BytesMut::new();
        frame.put_u64(number);
        frame.put_u8(u8::try_from(name.len()).unwrap_or(u8::MAX));
        frame.put_slice(name);
        let mut frame = frame.writer();
        serde_json::to_writer(&mut frame, body)?;
        Ok(frame.into_inner().freeze())
    }

    /// Of a frame; `None` when it is none.
    pub fn decode(mut frame: Bytes) -> Option<Self> {
        let number = frame.try_get_u64().ok()?;
        let length = usize::from(frame.try_get_u8().ok()?);
        if frame.len() < length {
            return None;
        }
        let name = String::from_utf8(frame.split_to(length).to_vec()).ok()?;
        let body = frame;
        Some(Self { number, name, body })
    }
}

/// An answer that has arrived.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// The call's number.
    pub number: u64,
    /// What was said to it.
    pub said: Result<Bytes, Error>,
}

impl Answer {
    /// As a frame.
    pub fn encode(number: u64, said: Result<Vec<u8>, Error>) -> Bytes {
        let (is_well, body) = match said {
            Ok(body) => (1, body),
            // An error that cannot be written becomes one that the other end makes of nothing.
            Err(error) => (0, serde_json::to_vec(&error).unwrap_or_default()),
        };
        let mut frame = BytesMut::with_capacity(9 + body.len());
        frame.put_u64(number);
        frame.put_u8(is_well);
        frame.put_slice(&body);
        frame.freeze()
    }

    /// Of a frame; `None` when it is none.
    pub fn decode(mut frame: Bytes) -> Option<Self> {
        let number = frame.try_get_u64().ok()?;
        let said = match frame.try_get_u8().ok()? {
            0 => Err(Error::from_response(
                http::StatusCode::INTERNAL_SERVER_ERROR,
                &frame,
            )),
            1 => Ok(frame),
            _ => return None,
        };
        Some(Self { number, said })
    }
}

#[cfg(test)]
mod tests {
    use flynn_api::ErrorCode;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_said_is_heard(number in any::<u64>(), name in "[a-z-]{0,20}", body in any::<Vec<u8>>()) {
            let call = Call { number, name: name.clone(), body: serde_json::to_vec(&body).unwrap().into() };
            prop_assert_eq!(Call::decode(Call::encode(number, &name, &body).unwrap()), Some(call));
            let answer = Answer { number, said: Ok(body.clone().into()) };
            prop_assert_eq!(Answer::decode(Answer::encode(number, Ok(body))), Some(answer));
            let error = Error::conflict(name);
            let said = Answer::decode(Answer::encode(number, Err(error.clone())));
            prop_assert_eq!(said, Some(Answer { number, said: Err(error) }));
        }

        #[test]
        fn other_bytes_are_no_harm(bytes in any::<Vec<u8>>()) {
            let frame = Bytes::from(bytes);
            if let Some(call) = Call::decode(frame.clone()) {
                prop_assert_eq!(9 + call.name.len() + call.body.len(), frame.len());
            }
            if let Some(Answer { said: Err(error), .. }) = Answer::decode(frame) {
                prop_assert_eq!(error.code, ErrorCode::Internal);
            }
        }
    }
}
