# LaU from stride 8 to the pixels, with the regression loss.
_base_ = ["./_base_/camvid.py"]

model = dict(
    decode_head=dict(
        type="LaUFCNHead",
        lau=dict(
            scale_factor=8,
            mid_channels=32,
            base_grid="half_pixel",
            init="small",
            loss=dict(mode="reg", lambda_=0.3, gamma=0.1),
        ),
    ),
)
